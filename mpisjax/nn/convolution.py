"""Convolutions whose gradients stay fast inside loops, and upsampling with a cheap transpose.

The input gradient of a convolution convolves with the flipped kernel. Inside a loop XLA:CPU folds that flip into
the convolution, a form its fast path rejects (measured: 40 times slower). Here the flip is made explicitly and
held behind an optimisation barrier; and the transposed convolution *is* that gradient, so that its own gradient
is a plain convolution. The weight gradient, which a loop computes when one differentiates through time or accumulates over
parts of a batch, has its transpositions held back in the same way (measured: 75 times slower without). On accelerators the barrier is a copy of the kernel and nothing else.

On a CPU wide stride-1 convolutions have fewer multiplications (`mpisjax.cpu.winograd`); these and most others are compiled
for the processor (`mpisjax.cpu`), and where that is not to be had large strided transposed ones go by their phases.
The choice is made when a program is lowered for a platform, so that an export for several holds the right form for each.

Layouts are NHWC for activity and HWIO for kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpisjax.cpu import convolutions as native
from mpisjax.cpu import winograd

Array = jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def halved(size: int, times: int = 1) -> int:
    """A spatial size after `times` stride-2 convolutions with "same" padding: 28, 14, 7, 4, 2, 1."""
    return -(-size // 2**times)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _before(size: tuple[int, ...], w: Array, stride: int) -> tuple[int, int]:
    """Rows and columns of padding before an image of spatial `size`."""
    return _same_padding(size[0], w.shape[0], stride)[0], _same_padding(size[1], w.shape[1], stride)[0]


def _conv(x: Array, w: Array, stride: int) -> Array:
    padding = [_same_padding(n, k, stride) for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=_LAYOUT)


class _Flipped(NamedTuple):
    """The kernels of `_input_gradient`: the flipped one, and what a CPU takes instead where that is faster."""

    plain: Array
    phases: tuple[Array, ...] = ()
    filtered: Array | None = None


# From so many channels on a kernel's gradient has fewer multiplications, too, on a CPU.
_WIDE = 64


def _filtered(x: Array, w: Array, stride: int) -> Array | None:
    """The kernels of `winograd.convolve` where a CPU is fastest with it; None elsewhere."""
    return winograd.kernels(w) if winograd.worthwhile(x, w, stride) else None


def _convolve(x: Array, w: Array, filtered: Array | None, stride: int) -> Array:
    def plain(x: Array, w: Array, filtered: Array | None) -> Array:
        del filtered
        return _conv(x, w, stride)

    def on_cpu(x: Array, w: Array, filtered: Array | None) -> Array:
        if filtered is not None:
            filters = native.filtered if native.supports(x, w.shape) else winograd.convolve
            return filters(x, filtered, w.shape[0])
        rows, columns = (-(-n // stride) for n in x.shape[1:3])
        return native.convolve(x, w, stride, 1, _before(x.shape[1:3], w, stride), (rows, columns))

    if filtered is None and not native.supports(x, w.shape):
        return _conv(x, w, stride)
    return lax.platform_dependent(x, w, filtered, cpu=on_cpu, default=plain)


def _flipped(g: Array, w: Array, stride: int, size: tuple[int, int]) -> _Flipped:
    plain = lax.optimization_barrier(lax.rev(w, (0, 1)).swapaxes(2, 3))
    if stride == 1:
        return _Flipped(plain, filtered=_filtered(g, plain, 1))
    # XLA:CPU takes 1.4 to 1.7 times as long for the dilated form as for its phases at 28x28; as long at 14x14.
    if native.supports(g, plain.shape) or stride > min(w.shape[:2]) or min(size) <= 14:
        return _Flipped(plain)
    rows, columns = (_phases(n, k, stride) for n, k in zip(size, w.shape[:2], strict=True))
    return _Flipped(
        plain,
        phases=tuple(
            lax.optimization_barrier(plain[top::stride, left::stride])
            for top, _, _ in rows
            for left, _, _ in columns
        ),
    )


def _phases(n: int, k: int, stride: int) -> list[tuple[int, int, int]]:
    """How the outputs of a transposed convolution that lie `stride` apart, size n, meet its flipped kernel.

    Returns:
      By phase: the first tap met, how many, and how far the first reaches before the phase's first output.
    """
    low, found = k - 1 - _same_padding(n, k, stride)[0], []
    for phase in range(stride):
        first = (low - phase) % stride
        found.append((first, len(range(first, k, stride)), (low - phase - first) // stride))
    return found


def _input_gradient(g: Array, kernels: _Flipped, stride: int, size: tuple[int, int]) -> Array:
    """d<g, conv(x, w)>/dx for an x of spatial `size`: the transposed convolution."""
    if kernels.filtered is not None:
        return _convolve(g, kernels.plain, kernels.filtered, 1)

    def dilated(g: Array, kernels: _Flipped) -> Array:
        padding = []
        for n, m, k in zip(size, g.shape[1:3], kernels.plain.shape[:2], strict=True):
            low = k - 1 - _same_padding(n, k, stride)[0]
            padding.append((low, n + k - 1 - ((m - 1) * stride + 1) - low))
        return lax.conv_general_dilated(
            g, kernels.plain, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
        )

    def by_phases(g: Array, kernels: _Flipped) -> Array:
        pads = [
            [(before, -(-n // stride) + taps - 1 - before - m) for _, taps, before in _phases(n, k, stride)]
            for n, m, k in zip(size, g.shape[1:3], kernels.plain.shape[:2], strict=True)
        ]
        rows, remaining = [], iter(kernels.phases)
        for above in pads[0]:
            columns = [
                lax.conv_general_dilated(
                    g, next(remaining), (1, 1), [above, beside], dimension_numbers=_LAYOUT
                )
                for beside in pads[1]
            ]
            rows.append(jnp.stack(columns, 3))
        out = jnp.stack(rows, 2)  # [batch, row, phase, column, phase, channels]
        b, h, _, w, _, c = out.shape
        return out.reshape(b, h * stride, w * stride, c)[:, : size[0], : size[1]]

    def by_native(g: Array, kernels: _Flipped) -> Array:
        w = kernels.plain
        top, left = _before(size, w, stride)
        return native.convolve(g, w, 1, stride, (w.shape[0] - 1 - top, w.shape[1] - 1 - left), size)

    if native.supports(g, kernels.plain.shape):
        return lax.platform_dependent(g, kernels, cpu=by_native, default=dilated)
    if not kernels.phases:
        return dilated(g, kernels)
    return lax.platform_dependent(g, kernels, cpu=by_phases, default=dilated)


def _kernel_gradient(x: Array, g: Array, w: Array, stride: int) -> Array:
    """d<g, conv(x, w)>/dw."""

    def plain(x: Array, g: Array, w: Array) -> Array:
        return jax.vjp(lambda w: _conv(x, w, stride), w)[1](g)[0]

    def channels_first(x: Array, g: Array, w: Array) -> Array:
        padding = []
        for n, m, k in zip(x.shape[1:3], g.shape[1:3], w.shape[:2], strict=True):
            low = _same_padding(n, k, stride)[0]
            padding.append((low, (m - 1) * stride + k - n - low))
        x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))
        found = lax.conv_general_dilated(
            x, g, (1, 1), padding, rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
        )
        return found.transpose(1, 2, 0, 3)

    def on_cpu(x: Array, g: Array, w: Array) -> Array:
        wide = winograd.worthwhile_gradient(x, w, stride) and min(w.shape[2:]) >= _WIDE
        if not wide and native.supports(x, w.shape):
            low = _before(x.shape[1:3], w, stride)
            return native.kernel_gradient(x, g, (w.shape[0], w.shape[1]), stride, low)
        if winograd.worthwhile_gradient(x, w, stride):
            return winograd.kernel_gradient(x, g, w.shape[0])
        return channels_first(x, g, w)

    return lax.platform_dependent(x, g, w, cpu=on_cpu, default=plain)


def conv2d(x: Array, w: Array, stride: int = 1) -> Array:
    """2-D convolution (cross-correlation) with "same" padding.

    Args:
      x: [batch, height, width, in].
      w: [kernel, kernel, in, out], same dtype as `x`.
      stride: 1 or 2.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), out].
    """
    # Made out here, not within the rule, so that a loop over x can do it once.
    return _convolved(x, w, _filtered(x, lax.stop_gradient(w), stride), stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolved(x: Array, w: Array, filtered: Array | None, stride: int) -> Array:
    return _convolve(x, w, filtered, stride)


def _convolved_fwd(
    x: Array, w: Array, filtered: Array | None, stride: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, w, filtered, stride), (x, w)


def _convolved_bwd(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, w = saved
    size = x.shape[1], x.shape[2]
    dx = _input_gradient(g, _flipped(g, w, stride, size), stride, size)
    return dx, _kernel_gradient(x, g, w, stride), None


_convolved.defvjp(_convolved_fwd, _convolved_bwd)


def conv_transpose2d(x: Array, w: Array, stride: int, size: tuple[int, int]) -> Array:
    """Transposed convolution: the transpose of `conv2d(., w, stride)` on inputs of spatial `size`.

    Tying the output to a size, not to a multiple, makes odd sizes come out right: 4 -> 7 as well as 4 -> 8.

    Args:
      x: [batch, ceil(height / stride), ceil(width / stride), in].
      w: [kernel, kernel, out, in]: the kernel of the convolution that this is the transpose of.
      stride: that convolution's stride.
      size: (height, width) of the output.

    Returns:
      [batch, height, width, out].
    """
    # Flipped out here, not within the rule, so that a loop over x can do it once.
    return _transposed(x, w, _flipped(x, lax.stop_gradient(w), stride, size), stride, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _transposed(x: Array, w: Array, flipped: _Flipped, stride: int, size: tuple[int, int]) -> Array:
    del w  # the gradient's: `flipped` carries none
    return _input_gradient(x, flipped, stride, size)


def _transpose_fwd(
    x: Array, w: Array, flipped: _Flipped, stride: int, size: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _input_gradient(x, flipped, stride, size), (x, w)


def _transpose_bwd(
    stride: int, size: tuple[int, int], saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array, None]:
    del size
    x, w = saved
    return _convolve(g, w, _filtered(g, w, stride), stride), _kernel_gradient(g, x, w, stride), None


_transposed.defvjp(_transpose_fwd, _transpose_bwd)


def upsample(x: Array, factor: int, size: tuple[int, int]) -> Array:
    """Nearest-neighbour upsampling by `factor`, cropped to `size`.

    Broadcast and reshape, whose transpose is a sum; `jnp.repeat` would differentiate into a scatter.

    Args:
      x: [batch, h, w, channels].
      factor: whole number, >= 1.
      size: (height, width), at most `factor` times x's.
    """
    b, h, w, c = x.shape
    big = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, factor, w, factor, c))
    return big.reshape(b, h * factor, w * factor, c)[:, : size[0], : size[1]]
