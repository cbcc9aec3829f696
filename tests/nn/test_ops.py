"""Convolutions and upsampling against loops in NumPy: values and both gradients, odd and even sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax.nn.ops import conv2d, conv_transpose2d, halved, upsample


def places(size, kernel, stride, offset):
    """(output positions, input positions) that a kernel entry joins, with "same" padding."""
    out = -(-size // stride)
    low = max((out - 1) * stride + kernel - size, 0) // 2
    o = np.arange(out)
    i = o * stride + offset - low
    inside = (i >= 0) & (i < size)
    return o[inside], i[inside]


def each_entry(size, kernel, stride):
    for a in range(kernel):
        for b in range(kernel):
            (oy, iy), (ox, ix) = places(size[0], kernel, stride, a), places(size[1], kernel, stride, b)
            yield (a, b), np.ix_(oy, ox), np.ix_(iy, ix)


def np_conv(x, w, stride):
    size = x.shape[1:3]
    out = np.zeros((len(x), *(-(-n // stride) for n in size), w.shape[3]))
    for ab, (oy, ox), (iy, ix) in each_entry(size, w.shape[0], stride):
        out[:, oy, ox] += x[:, iy, ix] @ w[ab]
    return out


def np_input_gradient(g, w, stride, size):
    out = np.zeros((len(g), *size, w.shape[2]))
    for ab, (oy, ox), (iy, ix) in each_entry(size, w.shape[0], stride):
        out[:, iy, ix] += g[:, oy, ox] @ w[ab].T
    return out


def np_kernel_gradient(x, g, kernel, stride):
    out = np.zeros((kernel, kernel, x.shape[3], g.shape[3]))
    for ab, (oy, ox), (iy, ix) in each_entry(x.shape[1:3], kernel, stride):
        out[ab] = np.einsum("byxi,byxo->io", x[:, iy, ix], g[:, oy, ox])
    return out


@pytest.mark.parametrize("size", [(5, 6), (7, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_their_transposes_and_all_gradients(x64, kernel, stride, size):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(kernel, kernel, 3, 4))
    y = rng.normal(size=(2, *(halved(n) if stride == 2 else n for n in size), 4))

    @jax.jit
    def run(x, w, y):
        forward, pull = jax.vjp(lambda x, w: conv2d(x, w, stride), x, w)
        # y meets the transposed convolution; its own kernel is laid out [k, k, out, in].
        back, pull_back = jax.vjp(lambda y, w: conv_transpose2d(y, w, stride, size), y, w)
        # A second derivative of sorts: solvers on the normal equations transpose the transpose.
        dual = jax.linear_transpose(lambda g: pull(g)[0], y)(x)[0]
        return forward, pull(y), back, pull_back(x), dual

    forward, (dx, dw), back, (dy, dw_back), dual = run(x, w, y)
    np.testing.assert_allclose(forward, np_conv(x, w, stride), atol=1e-12)
    np.testing.assert_allclose(dx, np_input_gradient(y, w, stride, size), atol=1e-12)
    np.testing.assert_allclose(dw, np_kernel_gradient(x, y, kernel, stride), atol=1e-12)
    np.testing.assert_allclose(back, dx, atol=1e-12)
    np.testing.assert_allclose(dy, forward, atol=1e-12)
    np.testing.assert_allclose(dw_back, dw, atol=1e-12)
    np.testing.assert_allclose(dual, forward, atol=1e-12)


def test_a_convolution_is_the_librarys_with_same_padding():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 6, 7, 2)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 2, 2)), jnp.float32)
    expected = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(conv2d(x, w, 2), expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "size"), [(1, (2, 3)), (2, (4, 5)), (2, (3, 6)), (4, (5, 12))], ids=str)
def test_upsampling_repeats_and_crops_and_its_transpose_sums(x64, factor, size):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 3, 2)), rng.normal(size=(2, *size, 2))
    out, pull = jax.vjp(lambda x: upsample(x, factor, size), jnp.asarray(x))
    rows, columns = np.arange(size[0]) // factor, np.arange(size[1]) // factor
    np.testing.assert_array_equal(out, x[:, rows[:, None], columns])
    expected = np.zeros_like(x)
    np.add.at(expected, (slice(None), rows[:, None], columns), g)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], expected, atol=1e-12)


def test_upsampling_does_not_differentiate_into_a_scatter():
    text = str(jax.make_jaxpr(jax.grad(lambda x: upsample(x, 2, (5, 5)).sum()))(jnp.zeros((1, 3, 3, 1))))
    assert "scatter" not in text


def test_sizes_after_halvings():
    assert [halved(28, t) for t in range(6)] == [28, 14, 7, 4, 2, 1]
    assert [halved(7, t) for t in range(4)] == [7, 4, 2, 1]
    for size in range(1, 40):  # once four times over is four times once
        assert halved(halved(size), 1) == halved(size, 2)
