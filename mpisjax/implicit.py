"""The derivative of an equilibrium, by the implicit function theorem (Eq. 5 and 8).

At r = f(r, theta) the rates move with the parameters by dr = (I - J)^-1 (df/dtheta) dtheta, where J = df/dr. Forward
mode solves this system, and reverse mode its transpose, (I - J^T) v = g. No step of the forward is differentiated.

Source: "Efficient Training of Spiking Neural Networks with Multi-Parallel Implicit Stream Architecture" (MPIS-SNNs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.hoisting import hoist
from mpisjax.residuals import sample_norms
from mpisjax.solvers import Adjoint, AdjointStats, solve_adjoint


def adjoint_probe(batch_size: int | None = None) -> AdjointStats:
    """Zeros to pass as `probe`: their "gradient" is what the adjoint solve reports.

    A backward pass has no other way out for a value. Example:

        def loss(params, probe):
            return head(mpisjax.equilibrium_forward(f, params, x, init, probe=probe).rates)
        grads, stats = jax.grad(loss, argnums=(0, 1))(params, mpisjax.adjoint_probe())
        stats.residual, stats.num_steps

    Args:
      batch_size: None: one residual over the whole batch, and the mean of the samples' steps. Otherwise both by sample,
        float32 [batch_size].
    """
    shape = () if batch_size is None else (batch_size,)
    return AdjointStats(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


class Problem(NamedTuple):
    """An equilibrium r = f(r) and the step that is taken there, as functions that close over nothing traced."""

    # (constants, rates) -> (rates, what else carries a gradient)
    step: Callable[[list[Any], Any], tuple[Any, Any]]
    # (constants, rates) -> rates: f, whose Jacobian J is taken
    rate_map: Callable[[list[Any], Any], Any]
    adjoint: Adjoint
    batch_axis: int | None


class Constants(NamedTuple):
    """All that the equilibrium depends on: what is differentiated."""

    step: list[Any]
    rate_map: list[Any]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def at_equilibrium(problem: Problem, constants: Constants, found: Any, probe: AdjointStats | None) -> tuple[Any, Any]:
    """One step from the rates that the forward found; its derivative is that of the equilibrium (Eq. 5).

    With z the rates and d the tangents of everything else, dz = (I - J)^-1 (df/dtheta) d.
    """
    return problem.step(constants.step, found)


@at_equilibrium.defjvp
def _jvp(problem: Problem, primals: Any, tangents: Any) -> Any:
    constants, found, probe = primals
    # Of a first derivative `found` is a constant. A second one moves it, too.
    found = _anchored(problem, constants, found, probe)
    (rates, extras), (d_rates, d_extras) = jax.jvp(
        lambda c: problem.step(c, found), (constants.step,), (tangents[0].step,)
    )
    d_rates = _solve(problem, constants.rate_map, rates, d_rates, tangents[2])
    if jax.tree.leaves(extras):
        through_rates = jax.jvp(lambda r: problem.step(constants.step, r)[1], (found,), (d_rates,))[1]
        d_extras = jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, d_extras, through_rates)
    return (rates, extras), (d_rates, d_extras)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _anchored(problem: Problem, constants: Constants, found: Any, probe: AdjointStats | None) -> Any:
    """The rates that the forward found, with the derivative of the equilibrium."""
    return found


@_anchored.defjvp
def _anchored_jvp(problem: Problem, primals: Any, tangents: Any) -> Any:
    found = _anchored(problem, *primals)
    fixed = primals[0].rate_map
    along = jax.jvp(lambda c: problem.rate_map(c, found), (fixed,), (tangents[0].rate_map,))[1]
    return found, _solve(problem, fixed, found, along, tangents[2])


def _solve(problem: Problem, constants: list[Any], rates: Any, tangent: Any, probe: AdjointStats | None) -> Any:
    """(I - J)^-1 `tangent`, with J = df/dr at `rates`. Its transpose is the adjoint solve (Eq. 8).

    A probe takes part as one more unknown that nothing else depends on. The transposed solve writes its report there.
    """
    batch_axis = problem.batch_axis

    def product(r: Any, v: Any) -> Any:
        return jax.jvp(lambda r: problem.rate_map(constants, r), (r,), (v,))[1]

    def matvec(unknown: Any) -> Any:
        v, report = unknown
        return _linked((jax.tree.map(jnp.subtract, v, product(rates, v)), report))

    def solve(_: Any, right: Any) -> Any:
        tangent, report = right
        along, fixed = hoist(lambda v: product(rates, v), tangent)
        return solve_adjoint(along, fixed, tangent, problem.adjoint, batch_axis)[0], report

    def transpose_solve(_: Any, right: Any) -> Any:
        g, report = right
        _, vjp = jax.vjp(lambda r: problem.rate_map(constants, r), rates)
        # Out of the loop with what does not change in it: flipped kernels, products of weights.
        back, fixed = hoist(lambda v: vjp(v)[0], g)
        v, stats = solve_adjoint(back, fixed, g, problem.adjoint, batch_axis)
        return v, None if report is None else _as_asked(stats, report, g, batch_axis)

    right = _linked((tangent, probe))
    return _linked(jax.lax.custom_linear_solve(matvec, right, solve, transpose_solve))[0]


def _linked(tree: Any) -> Any:
    """Adds to each leaf a zero that is computed from all leaves. The values do not change, and XLA drops it.

    JAX transposes a linear solve only if every leaf of its right-hand side depends on what is differentiated. So each
    leaf is made to depend on all.
    """
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1:
        return tree
    total = sum(jnp.sum(leaf).astype(jnp.float32) for leaf in leaves)
    never = jnp.where(False, total, jnp.zeros((), jnp.float32))
    return jax.tree.map(lambda leaf: leaf + never.astype(leaf.dtype), tree)


def _as_asked(stats: AdjointStats, probe: AdjointStats, g: Any, batch_axis: int | None) -> AdjointStats:
    """The report in the probe's shape: by sample, or of the whole batch."""
    if probe.residual.ndim or batch_axis is None:
        return AdjointStats(*(jnp.broadcast_to(s, p.shape) for s, p in zip(stats, probe, strict=True)))
    # One sum over the batch: each reduction that nothing else waits for is one more for devices to agree on.
    squares = [jnp.square(norm) for norm in jax.tree.leaves(sample_norms(g, batch_axis))]
    sizes = jnp.sqrt(sum(squares[1:], squares[0])).astype(jnp.float32)
    sizes = jnp.where(jnp.isfinite(sizes), jnp.minimum(sizes, 1e18), 0)
    errors = jnp.where(sizes > 0, stats.residual * sizes, 0)
    error, norm, steps = jnp.sum(jnp.stack([jnp.square(errors), jnp.square(sizes), stats.num_steps]), axis=1)
    residual = jnp.sqrt(error / jnp.where(norm > 0, norm, 1))
    return AdjointStats(residual.astype(jnp.float32), steps / len(sizes))
