"""Minimal filtering computes what the plain convolution does, and is taken only where it is faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpisjax.cpu import winograd

pytestmark = pytest.mark.unoptimized


def plain(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def case(size, kernel, channels=(3, 2), batch=2, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(kernel), 2)
    x = jax.random.normal(keys[0], (batch, *size, channels[0]), dtype)
    return x, jax.random.normal(keys[1], (kernel, kernel, *channels), dtype)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (3, 9), (1, 2)], ids=str)
def test_equals_the_plain_convolution_and_its_gradient(x64, size, kernel, batch):
    x, w = case(size, kernel, batch=batch)

    @jax.jit
    def both(x, w):
        y, pull = jax.vjp(lambda w: plain(x, w), w)
        g = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        filtered = winograd.convolve(x, winograd.kernels(w), kernel), winograd.kernel_gradient(x, g, kernel)
        return filtered, (y, pull(g)[0])

    for found, expected in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-11)


@pytest.mark.optimized
@pytest.mark.parametrize("kernel", [3, 5])
def test_float32_keeps_four_digits_at_the_width_it_is_made_for(kernel):
    x, w = case((28, 28), kernel, (64, 64), dtype=jnp.float32)
    w /= kernel * 8  # outputs near 1
    error = winograd.convolve(x, winograd.kernels(w), kernel) - plain(x, w)
    assert float(jnp.abs(error).max()) < 1e-4 and float(jnp.sqrt(jnp.mean(error**2))) < 5e-6


def test_chunks_hold_every_sample_once(x64, monkeypatch):
    x, w = case((6, 5), 3, batch=12)
    for tiles, devices in ((1, 1), (1, 8), (9, 1), (1000, 5)):
        monkeypatch.setattr(winograd, "_LARGE_KERNELS", -1)
        monkeypatch.setattr(winograd, "_TILES", tiles)
        monkeypatch.setattr(jax, "local_device_count", lambda n=devices: n)

        @jax.jit
        def both(x, w):
            g, pull = jax.vjp(lambda w: plain(x, w), w)
            filtered = winograd.convolve(x, winograd.kernels(w), 3), winograd.kernel_gradient(x, g, 3)
            return filtered, (g, pull(g)[0])

        for found, expected in zip(*both(x, w), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "channels", "dtype", "taken"),
    [
        (28, 5, 1, 64, "float32", True),
        (14, 3, 1, 48, "float32", True),
        (7, 3, 1, 48, "float32", True),
        (28, 5, 1, 16, "float32", True),
        (28, 7, 1, 64, "float32", False),
        (28, 3, 2, 64, "float32", False),
        (28, 3, 1, 16, "float32", False),
        (28, 3, 1, 64, "bfloat16", False),
        (5, 3, 1, 64, "float32", False),
    ],
    ids=str,
)
def test_is_taken_where_it_was_measured_to_be_faster(size, kernel, stride, channels, dtype, taken):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.dtype(dtype))
    w = jax.ShapeDtypeStruct((kernel, kernel, channels, channels), jnp.dtype(dtype))
    assert winograd.worthwhile(x, w, stride) == taken
