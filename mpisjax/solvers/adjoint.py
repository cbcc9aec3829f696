"""The adjoint system (I - J^T) v = g (Eq. 5 and 8). The only module that imports jaxopt.

GMRES and the normal equations' CG are jaxopt's: their residuals only fall, so their last iterate is their best.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mpisjax.errors import UserError
from mpisjax.meshes import varying
from mpisjax.residuals import global_norm, worst
from mpisjax.solvers.bicgstab import solve_bicgstab
from mpisjax.solvers.iteration import cast_like, iterate, mix, widened
from mpisjax.solvers.options import Adjoint
from mpisjax.solvers.samples import chosen, for_each_sample


class AdjointStats(NamedTuple):
    """What an adjoint solve reports.

    Attributes:
      residual: ||g - (I - J^T) v|| / ||g||: float32 [batch], or a scalar over the whole batch (see `adjoint_probe`).
      num_steps: products with J^T: float32 [batch], or their mean; -1 from "gmres" and "normal_cg", which do not count.
    """

    residual: Float[Array, "*batch"]
    num_steps: Float[Array, "*batch"]


def _jaxopt() -> Any:
    """jaxopt's linear solvers, imported when they are first used: half of the time of `import mpisjax` otherwise."""
    with warnings.catch_warnings():
        # jaxopt announces at import that it is no longer maintained: a matter for us, not for every user.
        warnings.simplefilter("ignore")
        from jaxopt import linear_solve
    return linear_solve


def solve_adjoint(
    product: Callable[[list[Array], PyTree], PyTree],
    constants: list[Array],
    g: PyTree[Float[Array, "..."]],
    config: Adjoint,
    batch_axis: int | None = 0,
) -> tuple[PyTree[Float[Array, "..."]], AdjointStats]:
    """Solves (I - J^T) v = g, for each sample.

    Each sample's system is solved for a g scaled to a largest entry of 1, so that no square over- or underflows.

    Args:
      product: `(constants, v) -> J^T v` of the whole batch, linear in v; see `for_each_sample`.
      constants: arrays, passed through.
      g: the loss's gradient with respect to the equilibrium rates.
      config: solver, tolerance and limit.
      batch_axis: the samples' axis; None: the whole batch is one problem.

    Returns:
      `(v, stats)`, the stats by sample. Where a solve does not converge, v is the iterate with the smallest residual,
      and never worse than v = g; it is finite whenever g and J are, and the residual says how good it is. The
      fixed-point solvers measure it on the iterate that the last product was taken of.
    """
    if config.solver == "gmres" and any(map(varying, jax.tree.leaves(g))):
        raise UserError(
            "adjoint.solver is 'gmres', whose loops in JAX do not run inside shard_map: choose 'neumann', 'anderson', "
            "'bicgstab' or 'normal_cg', or pass check_vma=False to shard_map."
        )

    def solve(one: Callable[[Any], Any], narrow: Any) -> Any:
        vjp, g = widened(one, narrow)
        largest = worst(jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf)), g))
        scalable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny)
        scale = jnp.where(scalable, largest, jnp.ones_like(largest))
        v, stats = _solve_scaled(vjp, jax.tree.map(lambda a: a / scale, g), config)
        return cast_like(jax.tree.map(lambda a: a * scale, v), narrow), stats

    return for_each_sample(solve, product, constants, g, batch_axis)


def _solve_scaled(vjp: Callable[[Any], Any], g: Any, config: Adjoint) -> tuple[Any, AdjointStats]:
    add, subtract = (lambda *t: jax.tree.map(jnp.add, *t)), (lambda *t: jax.tree.map(jnp.subtract, *t))
    g_norm = global_norm(g)
    g_norm = jnp.maximum(g_norm, jnp.finfo(g_norm.dtype).tiny)

    def relative(difference: Any) -> Array:
        return global_norm(difference) / g_norm

    def report(residual: Array, num_steps: Any) -> AdjointStats:
        return AdjointStats(residual.astype(jnp.float32), jnp.asarray(num_steps, jnp.float32))

    def advanced(v: Any) -> Any:
        return mix(config.damping, v, add(g, vjp(v)))

    def measure(new: Any, old: Any) -> Array:
        # new - old = (1 - damping) * (g - (I - J^T) old): the residual of the step before, at no further product.
        return relative(subtract(new, old)) / (1 - config.damping)

    if config.solver == "phantom":
        v, last = g, g
        for _ in range(config.max_steps):
            v, last = advanced(v), v
        residual = measure(v, last) if config.max_steps else jnp.full_like(g_norm, jnp.nan)
        return v, report(residual, config.max_steps)

    if config.solver in ("neumann", "anderson"):
        state = iterate(advanced, g, config, measure, keep_best=True)
        # A residual is measured on the iterate before: while it falls, the newest iterate is better still.
        v = chosen(state.improved, state.value, state.best)
        return v, report(state.best_residual, state.num_steps)

    def matvec(v: Any) -> Any:
        return subtract(v, vjp(v))

    num_steps: Any = -1
    if config.solver == "bicgstab":
        v, iterations = solve_bicgstab(matvec, g, g, config.tol, config.max_steps)
        num_steps = 2 * iterations
    elif config.solver == "normal_cg":
        v = _jaxopt().solve_normal_cg(matvec, g, init=g, tol=config.tol, maxiter=config.max_steps)
    else:
        v = _jaxopt().solve_gmres(
            matvec,
            g,
            init=g,
            tol=config.tol,
            restart=config.history,
            maxiter=-(-config.max_steps // config.history),
        )
    v = cast_like(v, g)
    residual, of_g = relative(subtract(g, matvec(v))), relative(vjp(g))
    # A breakdown gives NaN, or a wild iterate: the one-step gradient is worse than a solve but is a gradient.
    better = ~(residual <= of_g)
    v = jax.tree.map(lambda a, b: jnp.where(better, b, a), v, g)
    return v, report(jnp.where(better, of_g, residual), num_steps)
