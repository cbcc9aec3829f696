"""Convolutions and upsampling against loops in NumPy: values and both gradients, odd and even sizes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax import cpu
from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved, upsample

pytestmark = pytest.mark.unoptimized


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


def check_both_convolutions(kernel, stride, size, channels, batch=2):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(batch, *size, channels[0])), rng.normal(size=(kernel, kernel, *channels))
    y = rng.normal(size=(batch, *(halved(n) if stride == 2 else n for n in size), channels[1]))

    @jax.jit
    def run(x, w, y):
        forward, pull = jax.vjp(lambda x, w: conv2d(x, w, stride), x, w)
        # y meets the transposed convolution; its own kernel is laid out [k, k, out, in].
        back, pull_back = jax.vjp(lambda y, w: conv_transpose2d(y, w, stride, size), y, w)
        # A second derivative of sorts: solvers on the normal equations transpose the transpose.
        dual = jax.linear_transpose(lambda g: pull(g)[0], y)(x)[0]
        return forward, pull(y), back, pull_back(x), dual

    forward, (dx, dw), back, (dy, dw_back), dual = run(x, w, y)
    close = functools.partial(np.testing.assert_allclose, atol=1e-10 if max(channels) > 4 else 1e-12)
    close(forward, np_conv(x, w, stride))
    close(dx, np_input_gradient(y, w, stride, size))
    close(dw, np_kernel_gradient(x, y, kernel, stride))
    close(back, dx)
    close(dy, forward)
    close(dw_back, dw)
    close(dual, forward)


@pytest.mark.parametrize("size", [(5, 6), (7, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_their_transposes_and_all_gradients(x64, kernel, stride, size):
    check_both_convolutions(kernel, stride, size, (3, 4))


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "channels", "batch"),
    [
        (3, 1, (8, 7), (32, 33), 3),  # by minimal filtering on a CPU
        (5, 1, (4, 11), (17, 16), 6),
        (3, 2, (15, 18), (3, 4), 2),  # by phases
        (5, 2, (16, 15), (3, 2), 1),
    ],
    ids=str,
)
def test_the_forms_that_a_cpu_takes_compute_the_same(x64, kernel, stride, size, channels, batch):
    check_both_convolutions(kernel, stride, size, channels, batch)


@pytest.mark.parametrize("stride", [1, 2])
def test_each_platform_gets_its_own_form(stride):
    x, w, y = (
        jnp.zeros((2, 16, 16, 32)),
        jnp.zeros((3, 3, 32, 32)),
        jnp.zeros((2, 16 // stride, 16 // stride, 32)),
    )

    def text(platform):
        with cpu.disabled():  # XLA's own forms
            return lowered(platform)

    def lowered(platform):
        traced = jax.jit(lambda x, w, y: jax.vjp(lambda x: conv2d(x, w, stride), x)[1](y)).trace(x, w, y)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    own, others = text("cpu"), {text("cuda"), text("tpu")}
    for other in others:
        assert other.count("stablehlo.convolution") == 1
    assert own.count("stablehlo.convolution") == (0 if stride == 1 else 4)
    assert ("stablehlo.dot_general" in own) == (stride == 1)
    assert "mpisjax" not in own
    if cpu.enabled():
        compiled = lowered("cpu")
        assert compiled.count("stablehlo.convolution") == 0
        assert ("mpisjax_filter" in compiled) == (stride == 1)
        assert ("mpisjax_convolve" in compiled) == (stride == 2)
        assert "mpisjax" not in lowered("cuda")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU's fast path")
@pytest.mark.parametrize("layer", [conv2d, lambda x, w, s: conv_transpose2d(x, w, s, (2 * x.shape[1],) * 2)])
def test_gradients_inside_a_loop_keep_the_layout_of_the_fast_path(layer):
    """XLA folds what surrounds a convolution into it; in other layouts it took 60 times as long (weight gradients)."""
    w = jnp.ones((3, 3, 8, 8))

    def through_time(x, w):
        return jax.lax.scan(lambda c, _: (c + jnp.sum(layer(x + c, w, 2) ** 2), None), 0.0, None, length=5)[0]

    with cpu.disabled():
        compiled = jax.jit(jax.grad(through_time, (0, 1))).lower(jnp.ones((4, 14, 14, 8)), w).compile()
    labels = set(re.findall(r"dim_labels=(\S+?)[,\s]", compiled.as_text()))
    assert labels == {"b01f_01io->b01f"}


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


def test_a_wide_convolution_can_be_exported_for_any_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 8, 8, 32), jnp.float32)
    w = jnp.ones((3, 3, 32, 32))
    program = jax.export.export(jax.jit(conv2d), platforms=("cpu", "tpu"))(x, w)
    np.testing.assert_allclose(program.call(jnp.ones((3, 8, 8, 32)), w)[:, 4, 4], 9 * 32)
