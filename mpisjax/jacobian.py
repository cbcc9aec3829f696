"""The Jacobian of the equivalent map: its spectral radius, and a penalty that keeps it small."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
NEAR_ONE = 0.95
_log = logging.getLogger(__name__)


def _noise(key: Array, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def _squares(tree: Any) -> Array:
    """Squared norm by sample, over all leaves: [batch]."""
    parts = [
        jnp.sum(jnp.square(a.astype(jnp.float32)), axis=tuple(range(1, a.ndim)))
        for a in jax.tree.leaves(tree)
    ]
    return sum(parts[1:], parts[0])


def spectral_radius(rate_map: Callable[[Any], Any], rates: Any, key: Array, num_steps: int = 40) -> Array:
    """The spectral radius of J = d rate_map / d rates, by power iteration with J^T (same eigenvalues).

    What is returned is the geometric mean growth over the second half of the steps: it settles for a complex
    pair of leading eigenvalues too, where a quotient of successive norms would swing.

    Args:
      rate_map: f, samples independent of each other (batch normalisation with running statistics).
      rates: where J is taken, samples on axis 0.
      key: for the start vector.
      num_steps: products with J^T, at least 2.

    Returns:
      float32 [batch]. Below 1 the equilibrium attracts and the Neumann series of the adjoint converges.
    """
    _, vjp = jax.vjp(rate_map, rates)

    def scaled(v: Any, factor: Array) -> Any:
        return jax.tree.map(lambda a: a * factor.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype), v)

    def advance(v: Any, _: None) -> tuple[Any, Array]:
        v = vjp(v)[0]
        growth = jnp.sqrt(_squares(v))
        return scaled(v, 1 / jnp.maximum(growth, jnp.finfo(jnp.float32).tiny)), growth

    v = _noise(key, rates)
    v = scaled(v, jax.lax.rsqrt(_squares(v)))
    growth = jax.lax.scan(advance, v, None, length=num_steps)[1][num_steps // 2 :]
    return jnp.exp(jnp.mean(jnp.log(growth), axis=0))


def warn_near_one(radius: Any) -> str | None:
    """Logs a warning where the spectral radius of some samples nears 1, and returns it.

    Args:
      radius: float [samples].
    """
    radius = np.asarray(radius)
    share = float(np.mean(radius >= NEAR_ONE))
    if not share:
        return None
    message = (
        f"the spectral radius of the Jacobian is {NEAR_ONE} or more for {100 * share:.1f}% of the samples "
        f"(largest {radius.max():.3f}): near 1 the equilibrium is reached slowly and gradients grow; "
        "train.jacobian_penalty keeps it down"
    )
    _log.warning(message)
    return message


def jacobian_penalty(rate_map: Callable[[Any], Any], rates: Any, key: Array) -> Array:
    """Hutchinson's estimate of ||J||_F^2 / n, with n the number of rates of a sample, mean over the batch.

    One probe e ~ N(0, 1): E ||J^T e||^2 = ||J||_F^2 (Hutchinson, 1990; for equilibrium models: Bai, Koltun &
    Kolter, "Stabilizing equilibrium models by Jacobian regularization", 2021). Differentiable in what `rate_map`
    closes over; the rates count as constants.

    Args:
      rate_map: f, samples independent of each other.
      rates: where J is taken, samples on axis 0.
      key: for the probe.
    """
    rates = jax.lax.stop_gradient(rates)
    _, vjp = jax.vjp(rate_map, rates)
    size = sum(a[0].size for a in jax.tree.leaves(rates))
    return jnp.mean(_squares(vjp(_noise(key, rates))[0])) / size
