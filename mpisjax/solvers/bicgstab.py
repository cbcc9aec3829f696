"""BiCGSTAB (H. A. van der Vorst, 1992) for one sample, which keeps its best iterate.

Its residual does not fall step by step, and near a breakdown the iterate runs away. jaxopt's gives the last iterate,
and its loop, which is JAX's, does not run inside `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mpisjax.meshes import carried
from mpisjax.residuals import global_norm
from mpisjax.solvers.samples import any_sample, chosen


class _State(NamedTuple):
    x: PyTree
    r: PyTree  # the residual b - A x, by recursion
    p: PyTree  # the search direction
    rho: Array
    best: PyTree
    best_residual: Array
    num_steps: Array
    running: Array


def _dot(a: PyTree, b: PyTree) -> Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda m, n: jnp.tensordot(m, n, m.ndim), a, b))


def _ratio(over: Array, under: Array) -> Array:
    """`over / under`, 0 where `under` is 0: at the solution both vanish."""
    vanishes = under == 0
    return jnp.where(vanishes, jnp.zeros_like(over), over / jnp.where(vanishes, jnp.ones_like(under), under))


def _plus(a: PyTree, factor: Array | float, b: PyTree) -> PyTree:
    return jax.tree.map(lambda m, n: m + factor * n, a, b)


def solve_bicgstab(
    matvec: Callable[[PyTree], PyTree], b: PyTree, init: PyTree, tol: float, max_steps: int
) -> tuple[PyTree, Array]:
    """Solves A x = b.

    Args:
      matvec: x -> A x.
      b: pytree of arrays of one dtype.
      init: where to start, like `b`.
      tol: stops when ||b - A x|| <= tol * ||b||.
      max_steps: most iterations, of two products with A each.

    Returns:
      The iterate with the smallest residual, and the number of iterations (int32, a scalar).
    """
    bound = tol * global_norm(b)
    shadow = _plus(b, -1.0, matvec(init))
    norm = global_norm(shadow)
    start = _State(
        x=init,
        r=shadow,
        p=shadow,
        rho=_dot(shadow, shadow),
        best=init,
        best_residual=norm,
        num_steps=jnp.zeros((), jnp.int32),
        running=norm > bound,
    )

    def advance(state: _State) -> _State:
        product = matvec(state.p)
        alpha = _ratio(state.rho, _dot(shadow, product))
        half = _plus(state.r, -alpha, product)
        corrected = matvec(half)
        omega = _ratio(_dot(corrected, half), _dot(corrected, corrected))
        x = _plus(_plus(state.x, alpha, state.p), omega, half)
        r = _plus(half, -omega, corrected)
        rho = _dot(shadow, r)
        beta = _ratio(rho, state.rho) * _ratio(alpha, omega)
        p = _plus(r, beta, _plus(state.p, -omega, product))
        residual = global_norm(r)
        better = state.running & (residual < state.best_residual)
        num_steps = state.num_steps + state.running.astype(jnp.int32)
        return _State(
            x=x,
            r=r,
            p=p,
            rho=rho,
            best=chosen(better, x, state.best),
            best_residual=jnp.where(better, residual, state.best_residual),
            num_steps=num_steps,
            running=state.running & jnp.isfinite(residual) & (residual > bound) & (num_steps < max_steps),
        )

    end = jax.lax.while_loop(lambda state: any_sample(state.running), advance, carried(advance, start))
    return end.best, end.num_steps
