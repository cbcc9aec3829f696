"""Which form of a convolution a CPU is fastest with: this is what `mpisjax.nn.convolution` asks.

There are the three maps of that module. For each there are the compiled one (`mpisjax.cpu.compiled`), the one
with fewer multiplications (`mpisjax.cpu.winograd`), and a form in XLA's operations that XLA:CPU is fast at.
None stands for the plain operation of XLA.

`low` is how many rows and columns of zeros stand before the image in the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mpisjax.cpu import compiled, winograd
from mpisjax.cpu.library import enabled

Array = jax.Array
Pair = tuple[int, int]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# The compiled kernel gradient is faster up to here; with more channels the one with fewer multiplications is.
_WIDE = 64


def prepare(x: jax.ShapeDtypeStruct, w: Array, stride: int) -> tuple[Array, ...]:
    """The kernels that `convolve` takes beside `w`, which can be made before a loop."""
    return (winograd.kernels(w),) if winograd.worthwhile(x, w, stride) else ()


def convolve(x: Array, w: Array, prepared: Sequence[Array], stride: int, low: Pair) -> Array | None:
    """The convolution: [batch, height, width, in] and [k, k, in, out] to [batch, rows, columns, out]."""
    serves = _compiled_serves(x, w.shape[3])
    if prepared:
        return compiled.filtered(x, prepared[0]) if serves else winograd.convolve(x, prepared[0], w.shape[0])
    rows, columns = (-(-n // stride) for n in x.shape[1:3])
    return compiled.convolve(x, w, stride, 1, low, (rows, columns)) if serves else None


def prepare_transposed(
    g: jax.ShapeDtypeStruct, flipped: Array, stride: int, size: Pair, low: Pair
) -> tuple[Array, ...]:
    """The kernels that `transposed` takes beside the flipped one."""
    if stride == 1:
        return prepare(g, flipped, 1)
    # XLA:CPU takes 1.4 to 1.7 times as long for the dilated form as for its phases at 28x28; as long at
    # 14x14.
    small = stride > min(flipped.shape[:2]) or min(size) <= 14
    if small or _compiled_serves(g, flipped.shape[3]):
        return ()
    rows, columns = (_phases(k, stride, before) for k, before in zip(flipped.shape[:2], low, strict=True))
    return tuple(
        lax.optimization_barrier(flipped[top::stride, left::stride]) for top, _, _ in rows for left, _, _ in columns
    )


def transposed(g: Array, flipped: Array, prepared: Sequence[Array], stride: int, size: Pair, low: Pair) -> Array | None:
    """The input gradient: [batch, rows, columns, out] and flipped [k, k, out, in] to [batch, *size, in]."""
    reach = flipped.shape[0] - 1 - low[0], flipped.shape[1] - 1 - low[1]
    if stride == 1:
        return convolve(g, flipped, prepared, 1, reach)
    if _compiled_serves(g, flipped.shape[3]):
        return compiled.convolve(g, flipped, 1, stride, reach, size)
    return _by_phases(g, flipped.shape[:2], prepared, stride, size, low) if prepared else None


def kernel_gradient(x: Array, g: Array, kernel: Pair, stride: int, low: Pair) -> Array:
    """The kernel gradient: x and g, as above, to [*kernel, in, out]."""
    w = jax.ShapeDtypeStruct((*kernel, x.shape[3], g.shape[3]), x.dtype)
    fewer = winograd.worthwhile_gradient(x, w, stride)
    if _compiled_serves(x, w.shape[3]) and not (fewer and min(w.shape[2:]) >= _WIDE):
        return compiled.kernel_gradient(x, g, kernel, stride, low)
    if fewer:
        return winograd.kernel_gradient(x, g, kernel[0])
    # With batch and channels exchanged it is a convolution. The barrier keeps XLA from folding the
    # transpositions into it.
    padding = [
        (before, (m - 1) * stride + k - n - before)
        for n, m, k, before in zip(x.shape[1:3], g.shape[1:3], kernel, low, strict=True)
    ]
    x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))
    found = lax.conv_general_dilated(x, g, (1, 1), padding, rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT)
    return found.transpose(1, 2, 0, 3)


def _compiled_serves(x: Array | jax.ShapeDtypeStruct, out_channels: int) -> bool:
    # An export may leave the batch open: then a size is no number.
    sized = all(isinstance(n, int) and n > 0 for n in x.shape)
    return sized and compiled.serves(x.dtype, (out_channels,)) and enabled()


def _phases(k: int, stride: int, low: int) -> list[tuple[int, int, int]]:
    """How the outputs of a transposed convolution that lie `stride` apart meet its flipped kernel of k taps.

    Returns:
      By phase: the first tap met, how many, and how far the first reaches before the phase's first output.
    """
    reach, found = k - 1 - low, []
    for phase in range(stride):
        first = (reach - phase) % stride
        found.append((first, len(range(first, k, stride)), (reach - phase - first) // stride))
    return found


def _by_phases(g: Array, kernel: Sequence[int], phases: Sequence[Array], stride: int, size: Pair, low: Pair) -> Array:
    pads = [
        [(reach, -(-n // stride) + taps - 1 - reach - m) for _, taps, reach in _phases(k, stride, before)]
        for n, m, k, before in zip(size, g.shape[1:3], kernel, low, strict=True)
    ]
    rows, remaining = [], iter(phases)
    for above in pads[0]:
        columns = [
            lax.conv_general_dilated(g, next(remaining), (1, 1), [above, beside], dimension_numbers=_LAYOUT)
            for beside in pads[1]
        ]
        rows.append(jnp.stack(columns, 3))
    out = jnp.stack(rows, 2)  # [batch, row, phase, column, phase, channels]
    b, h, _, w, _, c = out.shape
    return out.reshape(b, h * stride, w * stride, c)[:, : size[0], : size[1]]
