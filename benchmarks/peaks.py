"""GFLOP/s of plain convolutions and matrix products, on the devices that training uses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import measure
from mpisjax import cpu
from mpisjax.cpu import compiled
from mpisjax.nn.flops import count
from mpisjax.training.devices import batch_sharding, replicated

# (title, kernel side, channels in and out, image side, samples a device): shapes at which a convolution does
# well, and the two that the F64C5 net is made of.
CONVOLUTIONS = (
    ("conv 3x3, 64 channels, 28x28", 3, 64, 28, 32),
    ("conv 5x5, 64 channels, 28x28", 5, 64, 28, 32),
    ("conv 3x3, 128 channels, 28x28", 3, 128, 28, 16),
    ("conv 3x3, 256 channels, 14x14", 3, 256, 14, 32),
)
MATRICES = 2048


class Peak(NamedTuple):
    """A measured rate, in GFLOP/s over all devices."""

    title: str
    gflops: float


def measure_peaks(mesh: jax.sharding.Mesh, dtype: Any = jnp.float32, repeats: int = 7) -> list[Peak]:
    """The fastest of several calls of each convolution and a matrix product, batches split over the mesh."""
    split, whole = batch_sharding(mesh), replicated(mesh)

    def rate(title: str, fn: Any, x: jax.Array, w: jax.Array) -> Peak:
        operations = count(convolve if w.ndim == 4 else fn, x, w)
        x, w = jax.device_put(x, split), jax.device_put(w, whole)
        jitted = jax.jit(fn, in_shardings=(split, whole), out_shardings=split)
        fastest = measure(lambda: jitted(x, w), repeats=repeats).fastest
        return Peak(title, operations / fastest / 1e9)

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def compiled_here(x: jax.Array, w: jax.Array) -> jax.Array:
        half, size = w.shape[0] // 2, (x.shape[1], x.shape[2])
        return compiled.convolve(x, w, 1, 1, (half, half), size)

    keys, peaks = jax.random.split(jax.random.key(0)), []
    for title, kernel, channels, side, samples in CONVOLUTIONS:
        x = jax.random.normal(keys[0], (samples * mesh.size, side, side, channels), dtype)
        w = jax.random.normal(keys[1], (kernel, kernel, channels, channels), dtype)
        peaks.append(rate(title, convolve, x, w))
        if cpu.enabled() and compiled.serves(dtype, [channels]):  # without saving multiplications, as XLA does it
            peaks.append(rate(f"{title}, compiled here", compiled_here, x, w))
    a = jax.random.normal(keys[0], (MATRICES * mesh.size, MATRICES), dtype)
    b = jax.random.normal(keys[1], (MATRICES, MATRICES), dtype)
    peaks.append(rate(f"matrix product, {MATRICES}", jnp.matmul, a, b))
    return peaks
