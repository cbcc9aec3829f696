"""Convolutions whose gradients stay fast inside loops, and upsampling with a cheap transpose.

The input gradient of a convolution convolves with the flipped kernel. Inside a loop XLA:CPU folds that flip into
the convolution, a form its fast path rejects (measured: 40 times slower). Here the flip is made explicitly and
held behind an optimisation barrier; and the transposed convolution *is* that gradient, so that its own gradient
is a plain convolution. On accelerators the barrier is a copy of the kernel and nothing else.

Layouts are NHWC for activity and HWIO for kernels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def halved(size: int, times: int = 1) -> int:
    """A spatial size after `times` stride-2 convolutions with "same" padding: 28, 14, 7, 4, 2, 1."""
    return -(-size // 2**times)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _conv(x: Array, w: Array, stride: int) -> Array:
    padding = [_same_padding(n, k, stride) for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _flipped(w: Array) -> Array:
    return lax.optimization_barrier(lax.rev(w, (0, 1)).swapaxes(2, 3))


def _input_gradient(g: Array, flipped: Array, stride: int, size: tuple[int, int]) -> Array:
    """d<g, conv(x, w)>/dx for an x of spatial `size`: the transposed convolution."""
    padding = []
    for n, m, k in zip(size, g.shape[1:3], flipped.shape[:2], strict=True):
        low = k - 1 - _same_padding(n, k, stride)[0]
        padding.append((low, n + k - 1 - ((m - 1) * stride + 1) - low))
    return lax.conv_general_dilated(
        g, flipped, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _kernel_gradient(x: Array, g: Array, w: Array, stride: int) -> Array:
    """d<g, conv(x, w)>/dw."""
    return jax.vjp(lambda w: _conv(x, w, stride), w)[1](g)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(x: Array, w: Array, stride: int = 1) -> Array:
    """2-D convolution (cross-correlation) with "same" padding.

    Args:
      x: [batch, height, width, in].
      w: [kernel, kernel, in, out], same dtype as `x`.
      stride: 1 or 2.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), out].
    """
    return _conv(x, w, stride)


def _conv2d_fwd(x: Array, w: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, w, stride), (x, w)


def _conv2d_bwd(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = _input_gradient(g, _flipped(w), stride, (x.shape[1], x.shape[2]))
    return dx, _kernel_gradient(x, g, w, stride)


conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


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
    return _transposed(x, w, _flipped(lax.stop_gradient(w)), stride, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _transposed(x: Array, w: Array, flipped: Array, stride: int, size: tuple[int, int]) -> Array:
    del w  # the gradient's: `flipped` carries none
    return _input_gradient(x, flipped, stride, size)


def _transpose_fwd(
    x: Array, w: Array, flipped: Array, stride: int, size: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _input_gradient(x, flipped, stride, size), (x, w)


def _transpose_bwd(
    stride: int, size: tuple[int, int], saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array, None]:
    del size
    x, w = saved
    return _conv(g, w, stride), _kernel_gradient(g, x, w, stride), None


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
