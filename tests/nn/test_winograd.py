"""The faster algorithm for wide stride-1 convolutions computes what the plain one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpisjax.nn import ops, winograd


def plain(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def case(height, width, kernel, channels=(3, 2), dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(height * 10 + kernel), 2)
    x = jax.random.normal(keys[0], (2, height, width, channels[0]), dtype)
    return x, jax.random.normal(keys[1], (kernel, kernel, *channels), dtype)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (6, 3), (7, 8), (28, 28)], ids=str)
def test_equals_the_plain_convolution(size, kernel):
    with jax.enable_x64(True):
        x, w = case(*size, kernel)
        np.testing.assert_allclose(winograd.convolve(x, winograd.kernels(w)), plain(x, w), atol=1e-11)


def test_float32_keeps_five_digits_at_the_width_it_is_made_for():
    x, w = case(28, 28, 5, (64, 64), jnp.float32)
    w /= 40  # outputs near 1
    error = winograd.convolve(x, winograd.kernels(w)) - plain(x, w)
    assert float(jnp.abs(error).max()) < 1e-4 and float(jnp.sqrt(jnp.mean(error**2))) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the algorithm is for CPUs")
@pytest.mark.parametrize("transpose", [False, True])
def test_ops_take_it_for_wide_layers_with_the_gradients_of_the_plain_one(transpose, monkeypatch):
    with jax.enable_x64(True):
        x, w = case(9, 6, 5, (32, 33))
        x = jnp.tile(x, (1, 1, 1, 2))[..., :33] if transpose else x
        seen = []
        convolve = winograd.convolve
        monkeypatch.setattr(winograd, "convolve", lambda *a: seen.append(None) or convolve(*a))

        def ours(x, w):
            return ops.conv_transpose2d(x, w, 1, x.shape[1:3]) if transpose else ops.conv2d(x, w)

        def reference(x, w):
            return plain(x, w[::-1, ::-1].swapaxes(2, 3)) if transpose else plain(x, w)

        out, vjp = jax.vjp(ours, x, w)
        expected, expected_vjp = jax.vjp(reference, x, w)
        np.testing.assert_allclose(out, expected, atol=1e-10)
        g = jax.random.normal(jax.random.key(5), out.shape, jnp.float64)
        for ours_, theirs in zip(vjp(g), expected_vjp(g), strict=True):
            np.testing.assert_allclose(ours_, theirs, atol=1e-9)
        assert len(seen) >= 2  # forward and input gradient


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "dtype"),
    [(7, 1, 64, "float32"), (3, 2, 64, "float32"), (3, 1, 16, "float32"), (3, 1, 64, "bfloat16")],
    ids=str,
)
def test_leaves_alone_what_it_is_not_made_for(kernel, stride, channels, dtype):
    x, w = jnp.zeros((1, 8, 8, channels), dtype), jnp.zeros((kernel, kernel, channels, channels), dtype)
    assert not winograd.applies(x, w, stride)
