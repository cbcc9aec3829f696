"""The layer every current comes from: weight-normalised (transposed) convolution, batch normalisation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mpisjax.nn.convolution import conv2d, conv_transpose2d
from mpisjax.nn.normalize import EPSILON, batch_normalize

Array = jax.Array


class ConvNorm(nn.Module):
    """`BN(conv(x, gain * v / ||v||))`: a weight-normalised convolution and batch normalisation.

    With running statistics both are affine: one kernel, one scale and one shift, which `hoist` then computes
    once a solve. With batch statistics the running ones are updated.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: 1 or 2.
      transpose: transposed convolution; the call then needs the output's size.
      batch_norm: False leaves batch normalisation out: `conv(x, gain * v / ||v||) + bias`.
      initial_gain: where the weight norm's gain starts.
      momentum: what the running statistics keep at an update.
      dtype: of the convolution and its result; statistics and parameters stay float32 (or wider).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    transpose: bool = False
    batch_norm: bool = True
    initial_gain: float = 1.0
    momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, batch_statistics: bool, size: tuple[int, int] | None = None) -> Array:
        """[batch, h, w, in] -> [batch, h', w', features], in `dtype`."""
        dtype = self.dtype or x.dtype
        out_axis = 2 if self.transpose else 3
        channels = (self.features, x.shape[-1]) if self.transpose else (x.shape[-1], self.features)
        init = nn.initializers.variance_scaling(
            2.0,
            "fan_in",
            "normal",
            in_axis=(-1 if self.transpose else -2),
            out_axis=(-2 if self.transpose else -1),
        )
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, *channels))
        gain = self.param("gain", nn.initializers.constant(self.initial_gain), (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))

        def along(vector: Array) -> Array:
            return vector[None, None, :, None] if self.transpose else vector[None, None, None]

        others = tuple(a for a in range(4) if a != out_axis)
        # An explicit rsqrt: with sqrt and a quotient XLA rewrites one use and not another, and then no longer
        # sees that the solve and the differentiable step convolve a constant input with the same kernel.
        inverse_norm = lax.rsqrt(jnp.sum(jnp.square(kernel), axis=others) + jnp.finfo(kernel.dtype).tiny)
        kernel = kernel * along(gain * inverse_norm)

        def convolve(kernel: Array) -> Array:
            kernel = kernel.astype(dtype)
            if self.transpose:
                assert size is not None
                return conv_transpose2d(x.astype(dtype), kernel, self.stride, size)
            return conv2d(x.astype(dtype), kernel, self.stride)

        if not self.batch_norm:
            return convolve(kernel) + bias.astype(dtype)[None, None, None]
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
        var = self.variable("batch_stats", "var", jnp.ones, (self.features,))
        if not batch_statistics:
            factor = scale * lax.rsqrt(var.value + EPSILON)
            # The scale fuses with the addition; folded into the kernel it would part this convolution from
            # the same one with batch statistics, which a constant input (the injection) shares.
            factor, shift = (v.astype(dtype)[None, None, None] for v in (factor, bias - mean.value * factor))
            return convolve(kernel) * factor + shift

        out, batch_mean, batch_var = batch_normalize(convolve(kernel), scale, bias)
        if not self.is_initializing():
            keep = self.momentum
            for running, of_batch in ((mean, batch_mean), (var, batch_var)):
                running.value = keep * running.value + (1 - keep) * of_batch.astype(running.value.dtype)
        return out
