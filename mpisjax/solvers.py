"""Forward and adjoint solvers. The only module that imports jaxopt.

Each is written for one sample and run for every one (`mpisjax.samples`): a sample that diverges, or is not a number,
leaves the others as they are alone. GMRES and the normal equations' CG are jaxopt's: their residuals only fall, so
their last iterate is their best. Picard, Neumann and Anderson are ours: jaxopt stops on absolute errors, where a rate
equilibrium wants a relative one by stream, and its Anderson mixes in JAX's default dtype.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mpisjax.bicgstab import solve_bicgstab
from mpisjax.errors import UserError
from mpisjax.meshes import carried, varying
from mpisjax.residuals import global_norm, relative_residual, worst
from mpisjax.samples import any_sample, chosen, for_each_sample

_FORWARD = ("picard", "anderson")
_KRYLOV = ("gmres", "bicgstab", "normal_cg")
_ADJOINT = ("neumann", "anderson", *_KRYLOV, "phantom")


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
      tol: a sample stops when each of its streams has a relative residual ||f(r) - r|| / ||f(r)|| of at most
        this; 0 takes `max_steps` steps. No stream stops before the others: they feed each other, so a stream that
        has settled moves again while another one moves.
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
      tol: a sample stops when ||g - (I - J^T) v|| <= tol * ||g||, over its streams.
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
        if self.damping and self.solver in _KRYLOV:
            raise UserError(
                f"adjoint.damping is {self.damping} but adjoint.solver is {self.solver!r}, which has none: set it to "
                "0, or the solver to 'neumann', 'anderson' or 'phantom'."
            )


class FixedPoint(NamedTuple):
    """A fixed-point solve.

    Attributes:
      value: pytree like the start.
      residual: the pytree with leaves of float [batch] (scalars without a batch axis): of the last iterate from which
        `value` was computed.
      num_steps: evaluations of f, int32 [batch] (or a scalar).
    """

    value: PyTree[Float[Array, "..."]]
    residual: PyTree[Float[Array, "*batch"]]
    num_steps: Int[Array, "*batch"]


class AdjointStats(NamedTuple):
    """What an adjoint solve reports.

    Attributes:
      residual: ||g - (I - J^T) v|| / ||g||: float32 [batch], or a scalar over the whole batch (see `adjoint_probe`).
      num_steps: products with J^T: float32 [batch], or their mean; -1 from "gmres" and "normal_cg", which do not count.
    """

    residual: Float[Array, "*batch"]
    num_steps: Float[Array, "*batch"]


class _History(NamedTuple):
    """The last iterates that Anderson mixes, with their residuals r = fn(z) - z: pytrees with a leading axis."""

    iterates: Any
    residuals: Any
    gram: Array  # inner products of the residuals


class _State(NamedTuple):
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


def _iterate(
    fn: Callable[[Any], Any],
    init: Any,
    config: RateForward | Adjoint,
    measure: Callable[[Any, Any], Any],
    keep_best: bool,
) -> _State:
    """Iterates z <- fn(z), mixed or not, until `measure(fn(z), z)` is at most `config.tol` everywhere."""
    size = config.history
    history = None
    if config.solver == "anderson":
        empty = jax.tree.map(lambda a: jnp.zeros((size, *a.shape), a.dtype), init)
        history = _History(empty, empty, jnp.zeros((size, size), jax.tree.leaves(init)[0].dtype))
    shapes = jax.eval_shape(measure, init, init)
    infinite = jax.tree.map(lambda s: jnp.full(s.shape, jnp.inf, s.dtype), shapes)
    start = _State(
        value=init,
        history=history,
        residual=infinite,
        num_steps=jnp.zeros((), jnp.int32),
        best=init if keep_best else None,
        best_residual=jnp.max(worst(infinite)),
        improved=jnp.zeros((), bool),
        running=jnp.ones((), bool),
    )

    def advance(state: _State) -> _State:
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
        return _State(value, history, residual, num_steps, best, best_residual, improved, running)

    return jax.lax.while_loop(lambda state: any_sample(state.running), advance, carried(advance, start))


def _jaxopt() -> Any:
    """jaxopt's linear solvers, imported when they are first used: half of the time of `import mpisjax` otherwise."""
    with warnings.catch_warnings():
        # jaxopt announces at import that it is no longer maintained: a matter for us, not for every user.
        warnings.simplefilter("ignore")
        from jaxopt import linear_solve
    return linear_solve


def _mix(keep: float, old: Any, new: Any) -> Any:
    """Damping."""
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, old, new) if keep else new


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _widened(fn: Callable[[Any], Any], init: Any) -> tuple[Callable[[Any], Any], Any]:
    """`fn` and `init` for iterates of one dtype, float32 at least: `fn` itself still computes in `init`'s dtypes.

    So the sums and inner products of a solve keep their digits, however coarse the activity is.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(init))
    wide = jax.tree.map(lambda a: a.astype(dtype), init)
    return lambda tree: _cast_like(fn(_cast_like(tree, init)), wide), wide


def solve_rates(
    fn: Callable[[list[Array], PyTree], PyTree],
    constants: list[Array],
    init: PyTree[Float[Array, "..."]],
    config: RateForward,
    batch_axis: int | None = 0,
) -> FixedPoint:
    """Solves r = fn(constants, r), for each sample.

    Args:
      fn: the equivalent map f of the whole batch: `(constants, rates) -> rates`; see `for_each_sample`.
      constants: arrays, passed through.
      init: where to start; a warm start is a good guess here.
      config: solver, tolerance and limit.
      batch_axis: the samples' axis; None: the whole batch is one problem.

    Returns:
      A `FixedPoint`. A solve that stopped at `max_steps`, or met a NaN, shows it in its residual; nothing is raised.
    """
    keep = config.damping

    def solve(one: Callable[[Any], Any], init: Any) -> Any:
        fn, wide = _widened(one, init)

        def damped(r: Any) -> Any:
            return _mix(keep, r, fn(r))

        def measure(value: Any, previous: Any) -> Any:
            residual = relative_residual(value, previous, None)
            return jax.tree.map(lambda a: a / (1 - keep), residual) if keep else residual

        state = _iterate(damped, wide, config, measure, keep_best=False)
        return _cast_like(state.value, init), (state.residual, state.num_steps)

    value, (residual, num_steps) = for_each_sample(solve, fn, constants, init, batch_axis)
    return FixedPoint(value, residual, num_steps)


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
        vjp, g = _widened(one, narrow)
        largest = worst(jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf)), g))
        scalable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny)
        scale = jnp.where(scalable, largest, jnp.ones_like(largest))
        v, stats = _solve_scaled(vjp, jax.tree.map(lambda a: a / scale, g), config)
        return _cast_like(jax.tree.map(lambda a: a * scale, v), narrow), stats

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
        return _mix(config.damping, v, add(g, vjp(v)))

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
        state = _iterate(advanced, g, config, measure, keep_best=True)
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
    v = _cast_like(v, g)
    residual, of_g = relative(subtract(g, matvec(v))), relative(vjp(g))
    # A breakdown gives NaN, or a wild iterate: the one-step gradient is worse than a solve but is a gradient.
    better = ~(residual <= of_g)
    v = jax.tree.map(lambda a, b: jnp.where(better, b, a), v, g)
    return v, report(jnp.where(better, of_g, residual), num_steps)
