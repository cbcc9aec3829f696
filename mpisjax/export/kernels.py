"""Convolutions between images of different resolutions, written as convolutions on one grid.

NIR has neither transposed convolution nor upsampling. But let the phases of an image be its sub-images: an image of
side `P * G` is `P * P` images of side G, pixel (y, x) being pixel (y // P, x // P) of phase (y mod P, x mod P). Laid
out so, as channels on the coarse grid, every linear map of the network (convolution of any stride, transposed
convolution, nearest upsampling) commutes with shifts of the grid, and so is a plain stride-1 convolution there.
Nothing is approximated. An image whose side is no multiple of P has, in the last row or column of the grid, phases
that lie outside it; whoever uses the kernels must keep those silent.

Kernels are HWIO here and images NHWC, as in `mpisjax.nn.convolution`; channel `(a * P + b) * C + c` of the grid is channel c
of phase (a, b).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray
Size = tuple[int, int]


def zeros_before(size: int, kernel: int, stride: int) -> int:
    """The zeros that "same" padding puts before the first pixel; the rest of them follow the last one."""
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


class Folded(NamedTuple):
    """A layer as it computes in evaluation: a convolution with everything folded in.

    Attributes:
        kernel: [k, k, in, out] of a convolution; [k, k, out, in] of a transposed one, as `conv_transpose2d` takes it.
        bias: [out].
    """

    kernel: Array
    bias: Array


def folded(
    layer: Callable[[jax.Array], jax.Array], kernel: int, stride: int, channels: int, size: Size
) -> Folded:
    """Reads the kernel and the bias off a layer, whatever it is made of, by differentiating it.

    Args:
        layer: An affine map [1, h, w, channels] -> [1, h', w', out], a convolution with "same" padding.
        kernel: The side of its kernel.
        stride: Its stride.
        channels: Of its input.
        size: The input's height and width: large enough for the whole kernel to be met somewhere.
    """
    return _read(layer, kernel, stride, jnp.zeros((1, *size, channels)), size, transposed=False)


def folded_transpose(
    layer: Callable[[jax.Array], jax.Array], kernel: int, stride: int, channels: int, size: Size
) -> Folded:
    """`folded` for a transposed convolution; `size` is its output's."""
    coarse = (-(-size[0] // stride), -(-size[1] // stride))
    return _read(layer, kernel, stride, jnp.zeros((1, *coarse, channels)), size, transposed=True)


def _read(layer: Any, kernel: int, stride: int, zeros: jax.Array, fine: Size, transposed: bool) -> Folded:
    out, pull = jax.vjp(layer, zeros)
    bias = np.asarray(out[0, out.shape[1] // 2, out.shape[2] // 2])
    found = np.zeros((kernel, kernel, zeros.shape[-1], out.shape[-1]), np.asarray(out).dtype)
    rows: dict[Size, Any] = {}
    for i in range(kernel):
        for j in range(kernel):
            (fy, cy), (fx, cx) = (_meeting(n, kernel, stride, t) for n, t in zip(fine, (i, j), strict=True))
            if min(fy, fx) < 0:
                continue  # a part of the kernel that no pixel of so small an image ever meets
            given, taken = ((cy, cx), (fy, fx)) if transposed else ((fy, fx), (cy, cx))
            if taken not in rows:  # d out[taken] / d input, for every output channel
                picked = jnp.eye(out.shape[-1], dtype=out.dtype)
                cotangents = jnp.zeros((out.shape[-1], *out.shape), out.dtype)
                cotangents = cotangents.at[:, 0, taken[0], taken[1], :].set(picked)
                rows[taken] = np.asarray(jax.vmap(lambda g: pull(g)[0])(cotangents))[:, 0]
            found[i, j] = rows[taken][:, given[0], given[1], :].T
    return Folded(found.swapaxes(2, 3) if transposed else found, bias)


def _meeting(fine: int, kernel: int, stride: int, tap: int) -> tuple[int, int]:
    """A fine and a coarse place that tap `tap` of the kernel connects, far from the border; (-1, -1) if none."""
    low, coarse = zeros_before(fine, kernel, stride), -(-fine // stride)
    places = [(stride * q + tap - low, q) for q in range(coarse) if 0 <= stride * q + tap - low < fine]
    return min(places, key=lambda place: abs(place[1] - coarse // 2), default=(-1, -1))


def _spread(
    taps: list[tuple[int, int, int, int]],
    taps_x: list[tuple[int, int, int, int]],
    kernel: Array,
    phases: Size,
) -> Array:
    """Places the taps (tap, phase out, phase in, shift of the grid) of both axes into one kernel on the grid."""
    out_phases, in_phases = phases
    reach = max((abs(t[3]) for t in (*taps, *taps_x)), default=0)
    side, (c_in, c_out) = 2 * reach + 1, kernel.shape[2:]
    grid = np.zeros((side, side, in_phases, in_phases, c_in, out_phases, out_phases, c_out), kernel.dtype)
    for i, a, b, dy in taps:
        for j, a_x, b_x, dx in taps_x:
            grid[dy + reach, dx + reach, b, b_x, :, a, a_x, :] = kernel[i, j]
    return grid.reshape(side, side, in_phases**2 * c_in, out_phases**2 * c_out)


def on_grid(kernel: Array, stride: int, size: Size, out_phases: int) -> Array:
    """A convolution of stride `stride` with "same" padding, on the grid.

    Args:
        kernel: [k, k, in, out].
        stride: Its stride.
        size: The true height and width of its input, which say where padding begins.
        out_phases: P of the output; the input's is `stride` times that.

    Returns:
        [side, side, in_phases^2 * in, out_phases^2 * out], to be used with stride 1 and `side // 2` zeros around.
    """
    k, in_phases = kernel.shape[0], stride * out_phases

    def taps(n: int) -> list[tuple[int, int, int, int]]:
        low = zeros_before(n, k, stride)
        found = []
        for a in range(out_phases):
            for tap in range(k):
                shift, b = divmod(stride * a + tap - low, in_phases)
                found.append((tap, a, b, shift))
        return found

    return _spread(taps(size[0]), taps(size[1]), kernel, (out_phases, in_phases))


def transpose_on_grid(kernel: Array, stride: int, size: Size, in_phases: int) -> Array:
    """A transposed convolution, on the grid.

    Args:
        kernel: [k, k, out, in], as `conv_transpose2d` takes it.
        stride: Of the convolution it is the transpose of.
        size: The true height and width of its output.
        in_phases: P of the input; the output's is `stride` times that.

    Returns:
        As `on_grid`.
    """
    k, out_phases = kernel.shape[0], stride * in_phases

    def taps(n: int) -> list[tuple[int, int, int, int]]:
        low = zeros_before(n, k, stride)
        found = []
        for b in range(in_phases):
            for tap in range(k):
                shift, a = divmod(stride * b + tap - low, out_phases)
                found.append((tap, a, b, -shift))
        return found

    return _spread(taps(size[0]), taps(size[1]), kernel.swapaxes(2, 3), (out_phases, in_phases))


def upsample_on_grid(channels: int, factor: int, in_phases: int) -> Array:
    """Nearest upsampling on the grid: [1, 1, in_phases^2 * channels, (factor * in_phases)^2 * channels]."""
    out_phases = factor * in_phases
    taps = [(0, a, a // factor, 0) for a in range(out_phases)]
    return _spread(taps, taps, np.eye(channels)[None, None], (out_phases, in_phases))


class Entry(NamedTuple):
    """A convolution from an image as it is to the grid, in NIR's terms.

    Attributes:
        kernel: [k', k', in, out_phases^2 * out].
        stride: Its stride.
        padding: Zeros on every side.
    """

    kernel: Array
    stride: int
    padding: int


def entry(kernel: Array, stride: int, size: int, grid: int, out_phases: int) -> Entry:
    """A convolution with "same" padding whose input is a square image and whose output lies on the grid.

    NIR pads alike on both sides; where that is more than wanted in front, the kernel has zeros there.

    Args:
        kernel: [k, k, in, out].
        stride: Its stride.
        size: The image's side.
        grid: The grid's side.
        out_phases: P of the output.
    """
    k, low = kernel.shape[0], zeros_before(size, kernel.shape[0], stride)
    step, needed = stride * out_phases, stride * (out_phases - 1) + k
    padding = max(low, (grid - 1) * step + needed - low - size)
    front = padding - low
    found = np.zeros(
        (needed + front, needed + front, kernel.shape[2], out_phases, out_phases, kernel.shape[3]),
        kernel.dtype,
    )
    for a in range(out_phases):
        for b in range(out_phases):
            y, x = stride * a + front, stride * b + front
            found[y : y + k, x : x + k, :, a, b] = kernel
    return Entry(found.reshape(*found.shape[:3], -1), step, padding)


def to_grid(image: Array, phases: int, grid: Size) -> Array:
    """An image [..., h, w, c] on the grid: [..., grid h, grid w, phases^2 * c], zeros outside the image."""
    *batch, h, w, c = image.shape
    whole = np.zeros((*batch, grid[0] * phases, grid[1] * phases, c), image.dtype)
    whole[..., :h, :w, :] = image
    split = whole.reshape(*batch, grid[0], phases, grid[1], phases, c)
    return np.moveaxis(split, -4, -3).reshape(*batch, *grid, phases**2 * c)


def from_grid(image: Array, phases: int, size: Size) -> Array:
    """`to_grid`, undone."""
    *batch, g, f, channels = image.shape
    c = channels // phases**2
    split = image.reshape(*batch, g, f, phases, phases, c)
    return np.moveaxis(split, -3, -4).reshape(*batch, g * phases, f * phases, c)[..., : size[0], : size[1], :]
