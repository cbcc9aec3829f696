"""The C++ against formulas in NumPy, quickly: CI runs this for several processors and with sanitizers."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax import cpu
from mpisjax.cpu import compiled, winograd

# CI sets MPISJAX_CPU_FLAGS where the C++ has to compile: then these tests may not be skipped.
required = "MPISJAX_CPU_FLAGS" in os.environ
pytestmark = pytest.mark.skipif(not required and not cpu.enabled(), reason="no C++ compiler, or not wanted")
# Channels below, at and above a multiple of 16, and of every number of vectors at a time.
CHANNELS = [(1, 8), (3, 16), (16, 24), (17, 48), (33, 33), (64, 64), (16, 112)]
SIZES = [(1, 1), (5, 7), (8, 14), (4, 28)]


def test_the_library_is_there():
    assert cpu.enabled()


def drawn(seed, *shape, density=1.0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)


def joined(size, outputs, taps, stride, dilation, low):
    """For each tap: the outputs that it reaches, and their input pixels."""
    for tap in range(taps):
        out = np.arange(outputs)
        place = stride * out + tap - low
        inside = (place >= 0) & (place < (size - 1) * dilation + 1) & (place % dilation == 0)
        yield tap, out[inside], place[inside] // dilation


def entries(x_shape, w_shape, size, stride, dilation, low):
    rows = joined(x_shape[1], size[0], w_shape[0], stride, dilation, low[0])
    columns = list(joined(x_shape[2], size[1], w_shape[1], stride, dilation, low[1]))
    for (i, out_y, in_y), (j, out_x, in_x) in itertools.product(rows, columns):
        yield (i, j), np.ix_(out_y, out_x), np.ix_(in_y, in_x)


def expected(x, w, size, stride, dilation, low):
    y = np.zeros((len(x), *size, w.shape[3]))
    for tap, (oy, ox), (iy, ix) in entries(x.shape, w.shape, size, stride, dilation, low):
        y[:, oy, ox] += x[:, iy, ix].astype(np.float64) @ w[tap]
    return y


def near(found, exact, tolerance=1e-5):
    assert np.abs(np.asarray(found) - exact).max() <= tolerance * max(np.abs(exact).max(), 1)


@pytest.mark.parametrize("density", [0, 0.05, 1], ids=["silent", "sparse", "dense"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel, stride, dilation, density):
    for n, ((ins, outs), size) in enumerate(zip(CHANNELS, itertools.cycle(SIZES), strict=False)):
        x, w = drawn(n, 3, *size, ins, density=density), drawn(n + 1, kernel, kernel, ins, outs)
        low = (kernel // 2, (kernel - 1) // 2)
        out = tuple(-(-s // stride) if dilation == 1 else s * dilation - 1 for s in size)
        found = compiled.convolve(jnp.asarray(x), jnp.asarray(w), stride, dilation, low, out)
        near(found, expected(x, w, out, stride, dilation, low))


@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_gradients(stride):
    for n, ((ins, outs), size) in enumerate(zip(CHANNELS, itertools.cycle(SIZES), strict=False)):
        small = tuple(-(-s // stride) for s in size)
        x, g = drawn(n, 3, *size, ins), drawn(n + 1, 3, *small, outs)
        exact = np.zeros((3, 3, ins, outs))
        for tap, (oy, ox), (iy, ix) in entries(x.shape, exact.shape, small, stride, 1, (1, 1)):
            exact[tap] = np.einsum("byxi,byxo->io", x[:, iy, ix], g[:, oy, ox])
        near(compiled.kernel_gradient(jnp.asarray(x), jnp.asarray(g), (3, 3), stride, (1, 1)), exact)


@pytest.mark.parametrize("kernel", [3, 5])
def test_filtering(kernel):
    for n, (channels, size) in enumerate(zip(CHANNELS, itertools.cycle(SIZES), strict=False)):
        x, w = drawn(n, 3, *size, channels[0]), drawn(n + 1, kernel, kernel, *channels)
        found = compiled.filtered(jnp.asarray(x), winograd.kernels(jnp.asarray(w)))
        near(found, expected(x, w, size, 1, 1, (kernel // 2,) * 2), 1e-4)


def test_threads_share_what_a_gradient_is_made_of():
    """A kernel so large that threads share its channels, not only the samples."""
    x, g = drawn(0, 4, 2, 2, 1024), drawn(1, 4, 2, 2, 1024)
    numbers = jnp.asarray((0, 4, 1, 0, 0), jnp.int32)
    target = jax.ffi.ffi_call("mpisjax_kernel_gradient", jax.ShapeDtypeStruct((3, 3, 1024, 1024), jnp.float32))
    near(target(x, g, numbers)[0, 0], np.einsum("byxi,byxo->io", x, g))
