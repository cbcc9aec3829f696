"""Feedback whose strength is bounded: a transposed convolution divided by its operator norm."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved

Array = jax.Array
ITERATIONS, FIRST_ITERATIONS = 3, 40


def _unit(a: Array) -> Array:
    return a * lax.rsqrt(jnp.sum(jnp.square(a)) + jnp.finfo(a.dtype).tiny)


def operator_norm(
    kernel: Array, direction: Array, stride: int, size: tuple[int, int], iterations: int = ITERATIONS
) -> tuple[Array, Array]:
    """The largest singular value of a transposed convolution as a linear map of whole images, by power iteration.

    It is the norm of the operator, zero padding included, not that of the kernel reshaped to a matrix [in, k k out]:
    the latter is what a single pixel's image can reach, and whole images may be amplified by up to k times as much.

    Args:
      kernel: [k, k, out, in], as `conv_transpose2d` takes it.
      direction: where to start, an input image of norm 1: [1, ceil(height / stride), ceil(width / stride), in].
      stride: 1 or 2.
      size: (height, width) of the output.
      iterations: products with A^T A.

    Returns:
      `(sigma, direction)`: sigma is ||A u|| at the direction found, differentiable in `kernel` (its gradient is the
      exact one of the largest singular value at the true direction); and that direction, a constant.
    """
    fixed = lax.stop_gradient(kernel)

    def improve(_: int, u: Array) -> Array:
        return _unit(conv2d(conv_transpose2d(u, fixed, stride, size), fixed, stride))

    found = lax.fori_loop(0, iterations, improve, _unit(lax.stop_gradient(direction)))
    image = conv_transpose2d(found, kernel, stride, size)
    return jnp.sqrt(jnp.sum(jnp.square(image)) + jnp.finfo(image.dtype).tiny), found


class SpectralConvTranspose(nn.Module):
    """`tanh(gain) * conv_transpose(x, v / ||v||_op) + bias`: feedback of operator norm below 1.

    The feedback of single-stream equilibrium nets (Xiao et al., 2021, "Training feedback spiking neural networks by
    implicit differentiation on the equilibrium state") is bounded so. A few power iterations from where training
    left off are enough, since weights move slowly; solve and differentiable step start from the same direction, so
    both see one weight. Nothing here depends on the rates: it is computed once a solve.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: 1 or 2.
      initial_gain: where the bounded gain starts, in (0, 1).
      dtype: of the convolution and its result; the norm is computed in float32 (or wider).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    initial_gain: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, batch_statistics: bool, size: tuple[int, int]) -> Array:
        """[batch, ceil(h / stride), ceil(w / stride), in] -> [batch, h, w, features], in `dtype`."""
        dtype = self.dtype or x.dtype
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, self.features, x.shape[-1]))
        gain = self.param("gain", nn.initializers.constant(jnp.arctanh(self.initial_gain)), ())
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        steps = (1, size[0], size[1]) if self.stride == 1 else (1, halved(size[0]), halved(size[1]))

        def start() -> Array:
            # A fixed draw: the direction is found again from anywhere that is not orthogonal to it.
            return _unit(jax.random.normal(jax.random.key(0), (*steps, x.shape[-1]), kernel.dtype))

        direction = self.variable("batch_stats", "direction", start)
        iterations = FIRST_ITERATIONS if self.is_initializing() else ITERATIONS
        norm, found = operator_norm(kernel, direction.value, self.stride, size, iterations)
        if batch_statistics:
            direction.value = found
        kernel = kernel * (jnp.tanh(gain) / norm)
        return conv_transpose2d(x.astype(dtype), kernel.astype(dtype), self.stride, size) + bias.astype(dtype)
