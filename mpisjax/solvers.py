"""Forward and adjoint solvers. The only module that imports jaxopt.

jaxopt's solvers advance; the stopping rules are ours, since jaxopt stops on absolute errors summed over the
batch, and a rate equilibrium wants a relative one by stream and sample.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError
from mpisjax.residuals import global_norm, relative_residual, worst

with warnings.catch_warnings():
    # jaxopt announces at import that it is no longer maintained: a matter for us, not for every user.
    warnings.simplefilter("ignore")
    from jaxopt import AndersonAcceleration, FixedPointIteration
    from jaxopt.linear_solve import solve_bicgstab, solve_gmres, solve_normal_cg

Array = jax.Array
_FORWARD = ("picard", "anderson")
_KRYLOV = {"bicgstab": solve_bicgstab, "normal_cg": solve_normal_cg}
_ADJOINT = ("neumann", "anderson", "gmres", *_KRYLOV, "phantom")


def _check(section: str, value: Any, solvers: tuple[str, ...], least_steps: int) -> None:
    if value.solver not in solvers:
        raise UserError(f"{section}.solver is {value.solver!r}: choose one of {', '.join(solvers)}.")
    if value.max_steps < least_steps:
        raise UserError(f"{section}.max_steps is {value.max_steps}: set it to at least {least_steps}.")
    if not value.tol >= 0:
        raise UserError(f"{section}.tol is {value.tol}: set it to 0 or more.")
    if value.history < 2:
        raise UserError(f"{section}.history is {value.history}: Anderson and GMRES need at least 2.")
    if not 0 <= value.damping < 1:
        raise UserError(f"{section}.damping is {value.damping}: set it in [0, 1).")


@dataclasses.dataclass(frozen=True)
class RateForward:
    """Find the equilibrium by solving r = f(r) with the rate reading.

    Attributes:
      solver: "picard" (fixed-point iteration) or "anderson".
      max_steps: most evaluations of f, >= 1.
      tol: stop when every stream of every sample has a relative residual ||f(r) - r|| / ||f(r)|| of at most
        this; 0 takes `max_steps` steps.
      history: iterates that Anderson mixes.
      damping: in [0, 1): solve with r <- damping * r + (1 - damping) * f(r), which can settle a map that
        overshoots.

    Raises:
      UserError: a value is outside its range.
    """

    solver: str = "picard"
    max_steps: int = 30
    tol: float = 1e-3
    history: int = 3
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check("forward", self, _FORWARD, 1)


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """How the backward pass solves (I - J^T) v = g (Eq. 5 and 8).

    Attributes:
      solver: "neumann" (v <- g + J^T v), "anderson", "gmres", "bicgstab", "normal_cg", or "phantom": exactly
        `max_steps` Neumann steps whatever the residual; 0 of them give the one-step gradient v = g.
      max_steps: most products with J^T (for "gmres", "bicgstab" and "normal_cg": most solver iterations).
      tol: stop when ||g - (I - J^T) v|| <= tol * ||g||, over the whole batch.
      history: iterates that Anderson mixes; Krylov vectors of GMRES between restarts.
      damping: in [0, 1), of "neumann", "anderson" and "phantom": v <- damping * v + (1 - damping) * (g + J^T v).
        J^T has J's eigenvalues, so what settles an overshooting forward settles its adjoint.

    Raises:
      UserError: a value is outside its range.
    """

    solver: str = "neumann"
    max_steps: int = 30
    tol: float = 1e-3
    history: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check("adjoint", self, _ADJOINT, 0 if self.solver == "phantom" else 1)
        if self.damping and self.solver in ("gmres", *_KRYLOV):
            raise UserError(
                f"adjoint.damping is {self.damping} but adjoint.solver is {self.solver!r}, which has none: set it to 0, or "
                "the solver to 'neumann', 'anderson' or 'phantom'."
            )


class FixedPoint(NamedTuple):
    """A fixed-point solve: `value`, its `residual` (float [batch] by leaf) and the evaluations `num_steps`."""

    value: Any
    residual: Any
    num_steps: Array


class AdjointStats(NamedTuple):
    """What an adjoint solve reports.

    Attributes:
      residual: ||g - (I - J^T) v|| / ||g|| over the batch, float32 scalar.
      num_steps: products with J^T, float32 scalar; -1 where the Krylov solver does not count them.
    """

    residual: Array
    num_steps: Array


class _State(NamedTuple):
    value: Any
    inner: Any  # jaxopt's state
    gram: Array  # Anderson's residual products, unscaled
    residual: Any
    num_steps: Array
    best: Any  # the iterate with the smallest measured residual
    best_residual: Array
    improved: Array  # whether the last step's residual was the smallest yet


def _iterate(
    fn: Callable[[Any], Any],
    init: Any,
    config: RateForward | Adjoint,
    measure: Callable[[Any, Any], Any],
    keep_best: bool,
) -> _State:
    """Drives a jaxopt fixed-point solver until `measure(f(z), z)` is at most `config.tol` everywhere."""
    anderson = config.solver == "anderson"

    def solver(ridge: Any) -> Any:
        options = {"maxiter": config.max_steps, "implicit_diff": False}
        if anderson:
            return AndersonAcceleration(fn, history_size=config.history, ridge=ridge, **options)
        return FixedPointIteration(fn, **options)

    ridge = 1e-5 if jax.tree.leaves(init)[0].dtype != jnp.float64 else 1e-12
    inner = jax.tree.map(jnp.asarray, solver(ridge).init_state(init))
    if anderson:
        # jaxopt keeps the products in the default float type, whatever the iterates are.
        dots = jnp.result_type(*jax.tree.leaves(init))
        inner = inner._replace(residual_gram=inner.residual_gram.astype(dots), error=inner.error.astype(dots))
    shapes = jax.eval_shape(measure, init, init)
    infinite = jax.tree.map(lambda s: jnp.full(s.shape, jnp.inf, s.dtype), shapes)
    start = _State(
        value=init,
        inner=inner,
        gram=inner.residual_gram if anderson else jnp.zeros(()),
        residual=infinite,
        num_steps=jnp.zeros((), jnp.int32),
        best=init if keep_best else None,
        best_residual=jnp.max(worst(infinite)),
        improved=jnp.zeros((), bool),
    )

    def unsolved(state: _State) -> Array:
        return (state.num_steps < config.max_steps) & ~jnp.all(worst(state.residual) <= config.tol)

    def advance(state: _State) -> _State:
        if anderson:
            # The mixing weights depend on the products' ratios alone: scaled to 1 they stay well
            # conditioned, and the ridge relative, however small the residuals have become.
            scale = jnp.maximum(jnp.max(jnp.diagonal(state.gram)), jnp.finfo(state.gram.dtype).tiny)
            scaled = state.inner._replace(residual_gram=state.gram / scale)
            value, inner = solver(ridge).update(state.value, scaled)
            slot = jnp.mod(state.inner.iter_num, config.history)
            row = inner.residual_gram[slot]
            gram = state.gram.at[slot, :].set(row).at[:, slot].set(row)
            previous = jax.tree.map(lambda h: h[slot], inner.params_history)
            inner = jax.tree.map(lambda new, old: new.astype(old.dtype), inner, state.inner)
        else:
            value, inner = solver(ridge).update(state.value, state.inner)
            gram, previous = state.gram, state.value
            inner = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), inner, state.inner)
        residual = measure(value, previous)
        best, best_residual, improved = state.best, state.best_residual, state.improved
        if keep_best:
            now = jnp.max(worst(residual))
            improved = now < best_residual
            best = jax.tree.map(lambda a, b: jnp.where(improved, a, b), previous, best)
            best_residual = jnp.where(improved, now, best_residual)
        return _State(value, inner, gram, residual, state.num_steps + 1, best, best_residual, improved)

    return jax.lax.while_loop(unsolved, advance, start)


def _mix(keep: float, old: Any, new: Any) -> Any:
    """Damping."""
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, old, new) if keep else new


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _widened(fn: Callable[[Any], Any], init: Any) -> tuple[Callable[[Any], Any], Any]:
    """`fn` and `init` for iterates of float32 at least: `fn` itself still computes in `init`'s dtypes.

    So the sums and inner products of a solve keep their digits, however coarse the activity is.
    """
    wide = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), init)
    return lambda tree: _cast_like(fn(_cast_like(tree, init)), wide), wide


def solve_rates(
    fn: Callable[[Any], Any], init: Any, config: RateForward, batch_axis: int | None = 0
) -> FixedPoint:
    """Solves r = fn(r).

    Args:
      fn: the equivalent map f, from a rates pytree to the like.
      init: where to start; a warm start is a good guess here.
      config: solver, tolerance and limit.
      batch_axis: the samples' axis, or None.

    Returns:
      A `FixedPoint`; the residual is that of the last iterate from which `value` was computed. A solve that
      stopped at `max_steps`, or met a NaN, shows it in its residual; nothing is raised.
    """
    keep = config.damping
    narrow = init
    fn, init = _widened(fn, init)

    def damped(r: Any) -> Any:
        return _mix(keep, r, fn(r))

    def measure(value: Any, previous: Any) -> Any:
        residual = relative_residual(value, previous, batch_axis)
        return jax.tree.map(lambda a: a / (1 - keep), residual) if keep else residual

    state = _iterate(damped, init, config, measure, keep_best=False)
    return FixedPoint(_cast_like(state.value, narrow), state.residual, state.num_steps)


def solve_adjoint(vjp: Callable[[Any], Any], g: Any, config: Adjoint) -> tuple[Any, AdjointStats]:
    """Solves (I - J^T) v = g.

    The system is solved for g scaled to a largest entry of 1, so that no square over- or underflows.

    Args:
      vjp: v -> J^T v.
      g: the loss's gradient with respect to the equilibrium rates.
      config: solver, tolerance and limit.

    Returns:
      `(v, stats)`. Where the solve diverges (spectral radius of J above 1) `v` is the iterate with the smallest
      residual seen, finite whenever `g` and J are, and the residual says so. The residual is measured, for the
      fixed-point solvers, on the iterate that the last product was taken of.
    """
    narrow = g
    vjp, g = _widened(vjp, g)
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(g)])
    scalable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny)
    scale = jnp.where(scalable, largest, jnp.ones_like(largest))
    v, stats = _solve_scaled(vjp, jax.tree.map(lambda a: a / scale.astype(a.dtype), g), config)
    return _cast_like(jax.tree.map(lambda a: a * scale.astype(a.dtype), v), narrow), stats


def _solve_scaled(vjp: Callable[[Any], Any], g: Any, config: Adjoint) -> tuple[Any, AdjointStats]:
    add, subtract = (lambda *t: jax.tree.map(jnp.add, *t)), (lambda *t: jax.tree.map(jnp.subtract, *t))
    g_norm = global_norm(g)
    g_norm = jnp.maximum(g_norm, jnp.finfo(g_norm.dtype).tiny)

    def relative(difference: Any) -> Array:
        return global_norm(difference) / g_norm

    def report(residual: Array, num_steps: Any) -> AdjointStats:
        return AdjointStats(residual.astype(jnp.float32), jnp.asarray(num_steps, jnp.float32))

    def advanced(v: Any) -> Any:
        return _mix(config.damping, v, add(g, vjp(v)))

    def measure(new: Any, old: Any) -> Array:
        # new - old = (1 - damping) * (g - (I - J^T) old): the residual of the step before, at no further product.
        return relative(subtract(new, old)) / (1 - config.damping)

    if config.solver == "phantom":
        v, last = g, g
        for _ in range(config.max_steps):
            v, last = advanced(v), v
        residual = measure(v, last) if config.max_steps else jnp.full((), jnp.nan)
        return v, report(residual, config.max_steps)

    if config.solver in ("neumann", "anderson"):
        state = _iterate(advanced, g, config, measure, keep_best=True)
        # A residual is measured on the iterate before: while it falls, the newest iterate is better still.
        v = jax.tree.map(lambda a, b: jnp.where(state.improved, a, b), state.value, state.best)
        return v, report(state.best_residual, state.num_steps)

    def matvec(v: Any) -> Any:
        return subtract(v, vjp(v))

    if config.solver == "gmres":
        v = solve_gmres(
            matvec,
            g,
            init=g,
            tol=config.tol,
            restart=config.history,
            maxiter=-(-config.max_steps // config.history),
        )
    else:
        v = _KRYLOV[config.solver](matvec, g, init=g, tol=config.tol, maxiter=config.max_steps)
    residual = relative(subtract(g, matvec(v)))
    # A Krylov breakdown gives NaN: the one-step gradient is worse than a solve but is a gradient.
    sound = jnp.isfinite(residual)
    v = jax.tree.map(lambda a, b: jnp.where(sound, a, b), v, g)
    return v, report(jnp.where(sound, residual, jnp.inf), -1)
