"""The equilibrium of the rates: r = f(r)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree

from mpisjax.residuals import relative_residual
from mpisjax.solvers.iteration import cast_like, iterate, mix, widened
from mpisjax.solvers.options import RateForward
from mpisjax.solvers.samples import for_each_sample


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
        fn, wide = widened(one, init)

        def damped(r: Any) -> Any:
            return mix(keep, r, fn(r))

        def measure(value: Any, previous: Any) -> Any:
            residual = relative_residual(value, previous, None)
            return jax.tree.map(lambda a: a / (1 - keep), residual) if keep else residual

        state = iterate(damped, wide, config, measure, keep_best=False)
        return cast_like(state.value, init), (state.residual, state.num_steps)

    value, (residual, num_steps) = for_each_sample(solve, fn, constants, init, batch_axis)
    return FixedPoint(value, residual, num_steps)
