"""The Jacobian of the equivalent map: its spectral radius, and a penalty that keeps it small."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

Rates = TypeVar("Rates")
NEAR_ONE = 0.95
_log = logging.getLogger(__name__)


def _noise(key: PRNGKeyArray, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def _squares(tree: PyTree[Float[Array, "batch ..."]]) -> Float[Array, " batch"]:
    """Squared norm by sample, over all leaves: [batch]."""
    parts = [jnp.sum(jnp.square(a.astype(jnp.float32)), axis=tuple(range(1, a.ndim))) for a in jax.tree.leaves(tree)]
    return sum(parts[1:], parts[0])


class SpectralRadius(NamedTuple):
    """An estimate of the spectral radius of J, by sample.

    Attributes:
      value: float32 [batch]. Below 1 the equilibrium attracts and the Neumann series of the adjoint converges.
      error: relative change of the estimate when its window was doubled last: float32 [batch].
      num_steps: products with J^T, int32 [batch].
    """

    value: Float[Array, " batch"]
    error: Float[Array, " batch"]
    num_steps: Int[Array, " batch"]


class _Power(NamedTuple):
    vector: Any
    log_growth: Array  # summed over the window
    taken: Array  # steps in the window so far
    window: Array  # its length
    found: SpectralRadius
    step: Array


def spectral_radius(
    rate_map: Callable[[Rates], Rates],
    rates: Rates,
    key: PRNGKeyArray,
    *,
    tol: float = 0.01,
    max_steps: int = 600,
) -> SpectralRadius:
    """The spectral radius of J = d rate_map / d rates, by power iteration with J^T (same eigenvalues).

    The estimate is the geometric mean growth over a window of steps. It settles for a complex pair of leading
    eigenvalues too, where a quotient of successive norms would swing. Windows double in length, each starting where the
    last ended, until two agree.

    Args:
      rate_map: f, samples independent of each other (batch normalisation with running statistics).
      rates: where J is taken, samples on axis 0.
      key: for the start vector.
      tol: a sample is done when its estimate changes by no more than this, relative, from one window to the next.
      max_steps: most products with J^T.

    Returns:
      A `SpectralRadius`. A sample that was not done has an error above `tol`.
    """
    _, vjp = jax.vjp(rate_map, rates)

    def scaled(v: Any, factor: Array) -> Any:
        return jax.tree.map(lambda a: a * factor.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype), v)

    def goes_on(state: _Power) -> Array:
        return (state.step < max_steps) & jnp.any(~(state.found.error <= tol))

    def advance(state: _Power) -> _Power:
        vector = vjp(state.vector)[0]
        growth = jnp.sqrt(_squares(vector))
        vector = scaled(vector, 1 / jnp.maximum(growth, jnp.finfo(jnp.float32).tiny))
        log_growth, count, step = state.log_growth + jnp.log(growth), state.taken + 1, state.step + 1
        full, old = count == state.window, state.found
        value = jnp.exp(log_growth / count)
        error = jnp.abs(value - old.value) / jnp.maximum(value, jnp.finfo(jnp.float32).tiny)
        new = SpectralRadius(value, error, jnp.broadcast_to(step, value.shape))
        renewed = full & ~(old.error <= tol)
        found = jax.tree.map(lambda a, b: jnp.where(renewed, a, b), new, old)
        return _Power(
            vector,
            jnp.where(full, 0, log_growth),
            jnp.where(full, 0, count),
            jnp.where(full, 2 * state.window, state.window),
            found,
            step,
        )

    v = _noise(key, rates)
    v = scaled(v, jax.lax.rsqrt(_squares(v)))
    unknown = jnp.full(_squares(v).shape, jnp.inf, jnp.float32)
    start = _Power(
        v,
        jnp.zeros_like(unknown),
        jnp.zeros((), jnp.int32),
        jnp.full((), 10, jnp.int32),
        SpectralRadius(unknown, unknown, jnp.zeros(unknown.shape, jnp.int32)),
        jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(goes_on, advance, start).found


def warn_near_one(radius: ArrayLike) -> str | None:
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


def jacobian_penalty(rate_map: Callable[[Rates], Rates], rates: Rates, key: PRNGKeyArray) -> Float[Array, ""]:
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
