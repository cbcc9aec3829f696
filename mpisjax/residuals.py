"""Norms and relative residuals of rates pytrees, by stream and sample."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

Streams: TypeAlias = PyTree[Float[Array, "..."]]
BySample: TypeAlias = PyTree[Float[Array, "*batch"]]


def _wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sample_norms(tree: Streams, batch_axis: int | None = 0) -> BySample:
    """L2 norm of each leaf (stream) and each entry of its batch axis (sample); float32 at least.

    Args:
      tree: pytree of arrays.
      batch_axis: the samples' axis; None: a leaf is one sample and its norm a scalar.

    Returns:
      The same pytree with leaves of shape [batch] (or []).
    """

    def norm(x: Array) -> Array:
        axes = tuple(a for a in range(x.ndim) if batch_axis is None or a != batch_axis % x.ndim)
        return jnp.sqrt(jnp.sum(jnp.square(_wide(x)), axis=axes))

    return jax.tree.map(norm, tree)


def by_sample(values: Shaped[Array, "*batch"], like: Array, batch_axis: int | None) -> Shaped[Array, "..."]:
    """[batch] values, shaped to broadcast against `like`; scalars as they are."""
    if batch_axis is None:
        return values
    shape = [1] * like.ndim
    shape[batch_axis] = -1
    return values.reshape(shape)


def relative_residual(value: Streams, previous: Streams, batch_axis: int | None = 0) -> BySample:
    """||value - previous|| / ||value|| by stream and sample, with `value = f(previous)`.

    A stream that falls silent (value zero, previous not) has residual 1, one that stays silent 0. The denominator is
    floored at the dtype's epsilon, so the quotient is finite wherever the rates are.
    """

    def ratio(difference: Array, norm: Array) -> Array:
        quotient = difference / jnp.maximum(norm, jnp.finfo(norm.dtype).eps)
        # Of a value of zero the difference is the previous norm.
        return jnp.where(norm == 0, jnp.sign(difference), quotient)

    differences = sample_norms(jax.tree.map(lambda a, b: _wide(a) - _wide(b), value, previous), batch_axis)
    return jax.tree.map(ratio, differences, sample_norms(value, batch_axis))


def worst(residual: BySample) -> Float[Array, "*batch"]:
    """The largest residual over streams, by sample: shape [batch] (or []). NaN where any stream is NaN."""
    leaves = jax.tree.leaves(residual)
    out = leaves[0]
    for leaf in leaves[1:]:
        out = jnp.maximum(out, leaf)
    return out


def global_norm(tree: Streams) -> Float[Array, ""]:
    """L2 norm over every entry of a pytree; float32 at least."""
    squares = [jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
