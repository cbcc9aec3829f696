"""Convolutions between images of different resolutions, written as convolutions of stride 1 on one grid.

NIR has neither transposed convolution nor upsampling. The polyphase form needs neither: an image of side `P *
G` is written as `P * P` phases, images of side G, where pixel (y, x) becomes pixel (y // P, x // P) of phase
(y mod P, x mod P) (`space_to_depth`). With its phases as channels, every linear map of the network
(convolution of any stride, transposed convolution, nearest upsampling) commutes with shifts of the grid, and
so is a plain convolution of stride 1 on it. This is exact. If the side of an image is no multiple of P, the
last row and column of the grid have phases that lie outside the image. Whoever uses the kernels must keep
those silent.

Kernels are HWIO and images NHWC, as in `mpisjax.nn.convolution`. Channel `(a * P + b) * C + c` of the grid is
channel c of phase (a, b).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.nn.convolution import same_padding

Array = np.ndarray
Size = tuple[int, int]


class Folded(NamedTuple):
    """A layer in evaluation: one convolution, with weight norm and batch normalisation folded into it.

    Attributes:
        kernel: [k, k, in, out] of a convolution; [k, k, out, in] of a transposed one, as `conv_transpose2d`
            takes it.
        bias: [out].
    """

    kernel: Array
    bias: Array


def fold(
    layer: Callable[[jax.Array], Any], kernel: int, stride: int, channels: int, fine: Size, transposed: bool = False
) -> Folded:
    """Reads the kernel and the bias of an affine layer from its derivative, whatever the layer is made of.

    Args:
        layer: An affine map [1, h, w, channels] -> [1, h', w', out], a convolution with "same" padding.
        kernel: The side of its kernel.
        stride: Its stride.
        channels: Of its input.
        fine: The input's height and width, large enough for some output pixel to meet the whole kernel; the output's
            of a transposed convolution.
        transposed: Whether the layer is a transposed convolution.
    """
    size = (-(-fine[0] // stride), -(-fine[1] // stride)) if transposed else fine
    out, pull = jax.vjp(layer, jnp.zeros((1, *size, channels)))
    bias = np.asarray(out[0, out.shape[1] // 2, out.shape[2] // 2])
    found = np.zeros((kernel, kernel, channels, out.shape[-1]), np.asarray(out).dtype)
    rows: dict[Size, Any] = {}
    for i in range(kernel):
        for j in range(kernel):
            (fine_y, coarse_y), (fine_x, coarse_x) = (
                _pixels_of_tap(n, kernel, stride, tap) for n, tap in zip(fine, (i, j), strict=True)
            )
            if min(fine_y, fine_x) < 0:
                continue  # in so small an image no pixel meets this part of the kernel
            source, target = (fine_y, fine_x), (coarse_y, coarse_x)
            if transposed:
                source, target = target, source
            if target not in rows:  # d out[target] / d input, for every output channel
                one_hot = jnp.eye(out.shape[-1], dtype=out.dtype)
                cotangents = jnp.zeros((out.shape[-1], *out.shape), out.dtype)
                cotangents = cotangents.at[:, 0, target[0], target[1], :].set(one_hot)
                rows[target] = np.asarray(jax.vmap(lambda g: pull(g)[0])(cotangents))[:, 0]
            found[i, j] = rows[target][:, source[0], source[1], :].T
    return Folded(found.swapaxes(2, 3) if transposed else found, bias)


def _pixels_of_tap(fine: int, kernel: int, stride: int, tap: int) -> tuple[int, int]:
    """A fine and a coarse pixel that a tap connects, far from the border; (-1, -1) if there are none."""
    low, coarse = same_padding(fine, kernel, stride)[0], -(-fine // stride)
    pixels = [(stride * q + tap - low, q) for q in range(coarse) if 0 <= stride * q + tap - low < fine]
    return min(pixels, key=lambda pair: abs(pair[1] - coarse // 2), default=(-1, -1))


Tap = tuple[int, int, int, int]  # tap of the kernel, phase of the output, phase of the input, shift on the grid


def _place_taps(taps_y: list[Tap], taps_x: list[Tap], kernel: Array, phases: Size) -> Array:
    """One kernel on the grid from the taps along both axes; `phases` are those of output and input."""
    out_phases, in_phases = phases
    reach = max((abs(tap[3]) for tap in (*taps_y, *taps_x)), default=0)
    side, (c_in, c_out) = 2 * reach + 1, kernel.shape[2:]
    grid = np.zeros((side, side, in_phases, in_phases, c_in, out_phases, out_phases, c_out), kernel.dtype)
    for i, a, b, dy in taps_y:
        for j, a_x, b_x, dx in taps_x:
            grid[dy + reach, dx + reach, b, b_x, :, a, a_x, :] = kernel[i, j]
    return grid.reshape(side, side, in_phases**2 * c_in, out_phases**2 * c_out)


def conv_kernel(kernel: Array, stride: int, size: Size, out_phases: int) -> Array:
    """A convolution of stride `stride` with "same" padding, on the grid.

    Args:
        kernel: [k, k, in, out].
        stride: Its stride.
        size: The true height and width of its input, which say where padding begins.
        out_phases: P of the output; the input's is `stride` times that.

    Returns:
        [side, side, in_phases^2 * in, out_phases^2 * out], to be used with stride 1 and `side // 2` zeros
        around.
    """
    k, in_phases = kernel.shape[0], stride * out_phases

    def taps(n: int) -> list[Tap]:
        low, _ = same_padding(n, k, stride)
        found = []
        for a in range(out_phases):
            for tap in range(k):
                shift, b = divmod(stride * a + tap - low, in_phases)
                found.append((tap, a, b, shift))
        return found

    return _place_taps(taps(size[0]), taps(size[1]), kernel, (out_phases, in_phases))


def transposed_kernel(kernel: Array, stride: int, size: Size, in_phases: int) -> Array:
    """A transposed convolution, on the grid: the transpose of its convolution, with the shifts reversed.

    Args:
        kernel: [k, k, out, in], as `conv_transpose2d` takes it.
        stride: Of the convolution it is the transpose of.
        size: The true height and width of its output.
        in_phases: P of the input; the output's is `stride` times that.

    Returns:
        As `conv_kernel`.
    """
    return conv_kernel(kernel, stride, size, in_phases)[::-1, ::-1].swapaxes(2, 3)


def upsampling_kernel(channels: int, factor: int, in_phases: int) -> Array:
    """Nearest upsampling on the grid: [1, 1, in_phases^2 * channels, (factor * in_phases)^2 * channels]."""
    out_phases = factor * in_phases
    taps = [(0, a, a // factor, 0) for a in range(out_phases)]
    return _place_taps(taps, taps, np.eye(channels)[None, None], (out_phases, in_phases))


def input_kernel(kernel: Array, stride: int, size: int, grid: int, out_phases: int) -> tuple[Array, int, int]:
    """A convolution with "same" padding from a square image to the grid.

    NIR pads both sides alike. Where that is more than "same" padding puts in front, the kernel has zeros
    there.

    Args:
        kernel: [k, k, in, out].
        stride: Its stride.
        size: The image's side.
        grid: The grid's side.
        out_phases: P of the output.

    Returns:
        In NIR's terms the kernel, [k', k', in, out_phases^2 * out], its stride, and the zeros on every side.
    """
    k = kernel.shape[0]
    low, _ = same_padding(size, k, stride)
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
    return found.reshape(*found.shape[:3], -1), step, padding


def space_to_depth(image: Array, phases: int, grid: Size) -> Array:
    """An image [..., h, w, c] on the grid: [..., grid h, grid w, phases^2 * c], zeros outside the image."""
    *batch, h, w, c = image.shape
    whole = np.zeros((*batch, grid[0] * phases, grid[1] * phases, c), image.dtype)
    whole[..., :h, :w, :] = image
    split = whole.reshape(*batch, grid[0], phases, grid[1], phases, c)
    return np.moveaxis(split, -4, -3).reshape(*batch, *grid, phases**2 * c)
