"""Fixed-point iteration of one sample, plain or with Anderson's mixing, for the rates and for the adjoint.

It is ours, because jaxopt stops on absolute errors, where a rate equilibrium wants a relative one by stream, and its
Anderson mixes in JAX's default dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mpisjax.meshes import carried
from mpisjax.residuals import worst
from mpisjax.solvers.options import Adjoint, RateForward
from mpisjax.solvers.samples import any_sample, chosen


class _History(NamedTuple):
    """The last iterates that Anderson mixes, with their residuals r = fn(z) - z: pytrees with a leading axis."""

    iterates: Any
    residuals: Any
    gram: Array  # inner products of the residuals


class State(NamedTuple):
    value: Any
    history: _History | None
    residual: Any
    num_steps: Array
    best: Any  # the iterate with the smallest measured residual
    best_residual: Array
    improved: Array  # whether the last step's residual was the smallest yet
    running: Array  # whether there is another step to take


def _mixed(history: _History, filled: Array) -> Any:
    """Anderson's next iterate: the z_i + r_i, weighted so that the residuals' weighted sum is smallest.

    D. G. Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965; the weights sum to 1.

    Args:
      history: what to mix.
      filled: how many of its entries hold something.
    """
    gram, size = history.gram, len(history.gram)
    # The weights depend on the products' ratios alone: scaled to 1 they stay well conditioned, and the ridge
    # relative, however small the residuals have become.
    gram = gram / jnp.maximum(jnp.max(jnp.diagonal(gram)), jnp.finfo(gram.dtype).tiny)
    holds = (jnp.arange(size, dtype=jnp.int32) < filled).astype(gram.dtype)
    ridge = 1e-5 if gram.dtype != jnp.float64 else 1e-12
    inner = gram + jnp.diag(jnp.where(holds > 0, ridge, 1).astype(gram.dtype))
    bordered = jnp.block([[jnp.zeros((1, 1), gram.dtype), holds[None]], [holds[:, None], inner]])
    right = jnp.zeros(size + 1, gram.dtype).at[0].set(1)
    weights = jnp.linalg.solve(bordered, right)[1:]
    return jax.tree.map(lambda z, r: jnp.tensordot(weights, z + r, 1), history.iterates, history.residuals)


def _remembered(history: _History, slot: Array, z: Any, r: Any) -> _History:
    """The history with one entry replaced."""
    here = jnp.arange(len(history.gram), dtype=jnp.int32) == slot

    def put(entries: Array, new: Array) -> Array:
        return jnp.where(here.reshape(-1, *[1] * new.ndim), new[None], entries)

    iterates = jax.tree.map(put, history.iterates, z)
    residuals = jax.tree.map(put, history.residuals, r)
    products = [
        jnp.tensordot(kept, new, new.ndim)
        for kept, new in zip(jax.tree.leaves(residuals), jax.tree.leaves(r), strict=True)
    ]
    row = sum(products[1:], products[0])
    gram = jnp.where(here[:, None], row[None, :], jnp.where(here[None, :], row[:, None], history.gram))
    return _History(iterates, residuals, gram)


def iterate(
    fn: Callable[[Any], Any],
    init: Any,
    config: RateForward | Adjoint,
    measure: Callable[[Any, Any], Any],
    keep_best: bool,
) -> State:
    """Iterates z <- fn(z), mixed or not, until `measure(fn(z), z)` is at most `config.tol` everywhere."""
    size = config.history
    history = None
    if config.solver == "anderson":
        empty = jax.tree.map(lambda a: jnp.zeros((size, *a.shape), a.dtype), init)
        history = _History(empty, empty, jnp.zeros((size, size), jax.tree.leaves(init)[0].dtype))
    shapes = jax.eval_shape(measure, init, init)
    infinite = jax.tree.map(lambda s: jnp.full(s.shape, jnp.inf, s.dtype), shapes)
    start = State(
        value=init,
        history=history,
        residual=infinite,
        num_steps=jnp.zeros((), jnp.int32),
        best=init if keep_best else None,
        best_residual=jnp.max(worst(infinite)),
        improved=jnp.zeros((), bool),
        running=jnp.ones((), bool),
    )

    def advance(state: State) -> State:
        running, previous, history = state.running, state.value, state.history
        if history is not None:
            mixed = _mixed(history, state.num_steps)
            previous = jax.tree.map(lambda a, b: jnp.where(state.num_steps > 0, a, b), mixed, previous)
        # A sample that has stopped stays as it is. The choice comes before the residual, so that XLA computes the new
        # iterate and the choice in one pass.
        value = chosen(running, fn(previous), state.value)
        if history is not None:
            r = jax.tree.map(jnp.subtract, value, previous)
            history = _remembered(history, jnp.mod(state.num_steps, size), previous, r)
        residual = chosen(running, measure(value, previous), state.residual)
        now, best, best_residual, improved = (
            jnp.max(worst(residual)),
            state.best,
            state.best_residual,
            state.improved,
        )
        if keep_best:
            better = running & (now < best_residual)
            best = chosen(better, previous, best)
            best_residual = jnp.where(better, now, best_residual)
            improved = jnp.where(running, better, improved)
        num_steps = state.num_steps + running.astype(jnp.int32)
        running &= (num_steps < config.max_steps) & ~jnp.all(worst(residual) <= config.tol)
        return State(value, history, residual, num_steps, best, best_residual, improved, running)

    return jax.lax.while_loop(lambda state: any_sample(state.running), advance, carried(advance, start))


def mix(keep: float, old: Any, new: Any) -> Any:
    """Damping."""
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, old, new) if keep else new


def cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def widened(fn: Callable[[Any], Any], init: Any) -> tuple[Callable[[Any], Any], Any]:
    """`fn` and `init` for iterates of one dtype, float32 at least: `fn` itself still computes in `init`'s dtypes.

    So the sums and inner products of a solve keep their digits, however coarse the activity is.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(init))
    wide = jax.tree.map(lambda a: a.astype(dtype), init)
    return lambda tree: cast_like(fn(cast_like(tree, init)), wide), wide
