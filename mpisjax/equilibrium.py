"""`equilibrium_forward`: the equilibrium of a spiking network, differentiated implicitly.

Source: "Efficient Training of Spiking Neural Networks with Multi-Parallel Implicit Stream Architecture"
(MPIS-SNNs), Eq. 2-5, 8, 10 and 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError
from mpisjax.hoisting import detach, hoist
from mpisjax.neurons import IF, LIF, RateReading
from mpisjax.residuals import relative_residual, worst
from mpisjax.simulate import SpikeForward, simulate, weighted_mean_frame
from mpisjax.solvers import Adjoint, AdjointStats, RateForward, solve_adjoint, solve_rates

Array = jax.Array
Transition = Callable[..., Any]


class Equilibrium(NamedTuple):
    """An equilibrium of a transition.

    Attributes:
      rates: firing rates, pytree like `init`; differentiable in `params` and `x`.
      residual: ||f(r) - r|| / ||f(r)|| of the rates the forward found, by stream and sample: pytree like `init`
        with float leaves of shape [batch] (scalars without a batch axis).
      num_steps: int32 scalar: time steps simulated, or evaluations of f by the solver; the most of any sample.
      converged: bool [batch] (scalar without a batch axis): every stream's residual is within the forward's
        tolerance, and with an early stop the rates settled. Never raises; NaN counts as not converged.
      aux: what `step` returned beside the rates; None without `step`.
    """

    rates: Any
    residual: Any
    num_steps: Array
    converged: Array
    aux: Any = None


def adjoint_probe() -> AdjointStats:
    """Zeros to pass as `probe`: their "gradient" is what the adjoint solve reports.

    A backward pass has no other way out for a value. Example::

        def loss(params, probe):
            return head(mpisjax.equilibrium_forward(f, params, x, init, probe=probe).rates)
        grads, stats = jax.grad(loss, argnums=(0, 1))(params, mpisjax.adjoint_probe())
        stats.residual, stats.num_steps
    """
    return AdjointStats(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _implicit(rate_map: Transition, adjoint: Adjoint, constants: list[Any], rates: Any, probe: Any) -> Any:
    """The identity on `rates`, whose cotangent g leaves as v = (I - J^T)^-1 g."""
    return rates


def _implicit_fwd(
    rate_map: Transition, adjoint: Adjoint, constants: list[Any], rates: Any, probe: Any
) -> Any:
    return rates, (constants, rates)


def _implicit_bwd(rate_map: Transition, adjoint: Adjoint, saved: tuple[list[Any], Any], g: Any) -> Any:
    constants, rates = saved
    _, vjp = jax.vjp(lambda r: rate_map(constants, r), rates)
    # Once more out of the loop with what does not change in it: flipped kernels, products of weights.
    product, fixed = hoist(lambda v: vjp(v)[0], g)
    v, stats = solve_adjoint(lambda v: product(fixed, v), g, adjoint)
    return None, v, stats


_implicit.defvjp(_implicit_fwd, _implicit_bwd)


def _check_transition(transition: Transition, params: Any, x: Any, init: Any, neuron: LIF) -> None:
    """Refuses, in one sentence, a transition that does not return what `init` promises."""

    def describe(tree: Any) -> list[str]:
        return [
            f"{jax.tree_util.keystr(path) or 'rates'}: {leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]

    out = jax.eval_shape(lambda *a: transition(*a, RateReading(neuron)), params, init, x)
    if str(jax.tree.structure(out)) != str(jax.tree.structure(init)) or describe(out) != describe(init):
        raise UserError(
            f"the transition returns rates {describe(out)} but init is {describe(init)}: give both the same "
            "structure, shapes and dtypes."
        )


def equilibrium_forward(
    transition: Transition,
    params: Any,
    x: Any,
    init: Any,
    *,
    neuron: LIF | None = None,
    forward: SpikeForward | RateForward | None = None,
    adjoint: Adjoint | None = None,
    time_axis: int | None = None,
    step: Transition | None = None,
    returns: str = "equivalent",
    batch_axis: int | None = 0,
    probe: AdjointStats | None = None,
) -> Equilibrium:
    """Finds the equilibrium firing rates of a spiking network, differentiable without a derivative in time.

    The network is one pure function, read twice: `transition(params, rates, x, fire) -> rates`, in which every
    neuron population is a call `fire(name, current) -> activity`. As spikes, `fire` steps LIF neurons and the
    transition is simulated (Eq. 2, 11); as rates, `fire` is DBReLU and the transition is the equivalent map f
    (Eq. 10). Both have the same fixed point. A network of two layers, complete::

        lambda p, z, x, fire: fire("out", fire("hidden", x @ p["in"] + z @ p["back"]) @ p["out"])

    Forward: r_T from the simulation or the rate solver, with no derivative taken, then one differentiable
    step r* = f(r_T), the paper's equivalent pathway. Backward (Eq. 5, 8): with g = dL/dr* and J = df/dr at r*,
    solve (I - J^T) v = g; then dL/dtheta = (df/dtheta)^T v through that one step. Memory does not depend on
    the number of time steps.

    Works under `jit`, `grad`, `vmap` (with `batch_axis=None`, or one more batch axis) and sharded `jit`.
    First-order reverse mode only: `jax.jvp` and second derivatives are refused by JAX.

    Args:
      transition: the network, as above. It may close over arrays, traced ones included (they get gradients
        too), but passing them in `params` is plainer.
      params: pytree of whatever the transition needs; float leaves get gradients.
      x: pytree: the input, a constant current; with `time_axis`, T frames. Float leaves get gradients.
      init: rates pytree, zeros as a rule: fixes structure, shape and dtype, and is where the solve starts.
      neuron: `LIF(...)` or `IF(...)`; IF with threshold 1 by default.
      forward: `SpikeForward(...)` (the default) or `RateForward(...)`.
      adjoint: `Adjoint(...)`.
      time_axis: None, or the axis of the frames in every leaf of `x`. The rate reading sees the leak-weighted
        mean frame.
      step: the one differentiable step, if it differs from the transition: same arguments, returns
        `(rates, aux)`. Batch normalisation uses it to take batch statistics there and there only.
      returns: "equivalent" for r* = f(r_T), or "spikes" for r_T itself with r*'s gradient.
      batch_axis: the samples' axis in every leaf of `init`; None if they have none.
      probe: `adjoint_probe()`, to learn from its gradient how the adjoint solve went.

    Returns:
      An `Equilibrium`.

    Raises:
      UserError: at trace time, for arguments that do not fit together. Nothing is raised by values.
    """
    neuron = IF() if neuron is None else neuron
    forward = SpikeForward() if forward is None else forward
    adjoint = Adjoint() if adjoint is None else adjoint
    probe = adjoint_probe() if probe is None else probe
    if returns not in ("equivalent", "spikes"):
        raise UserError(f"returns is {returns!r}: choose 'equivalent' or 'spikes'.")
    mean_x = x if time_axis is None else weighted_mean_frame(x, neuron.leak, time_axis)
    _check_transition(transition, params, mean_x, init, neuron)

    def f(rates: Any) -> Any:
        return transition(params, rates, mean_x, RateReading(neuron))

    rate_map, constants = hoist(f, init)
    constants, start = jax.lax.stop_gradient((constants, init))

    if isinstance(forward, RateForward):
        solved = solve_rates(lambda r: rate_map(constants, r), start, forward, batch_axis)
        found, num_steps, settled = solved.value, solved.num_steps, True
        tolerance = forward.tol
    else:

        def spikes(params: Any, x: Any, init: Any) -> Any:
            return simulate(
                transition,
                params,
                x,
                init,
                neuron=neuron,
                forward=forward,
                time_axis=time_axis,
                batch_axis=batch_axis,
            )

        simulation = detach(spikes, params, x, init)
        found, num_steps, settled = simulation.rates, jnp.max(simulation.num_steps), simulation.settled
        tolerance = forward.residual_tol
    found = jax.lax.stop_gradient(found)

    if step is None:
        rates, aux = f(found), None
        residual = relative_residual(jax.lax.stop_gradient(rates), found, batch_axis)
    else:
        rates, aux = step(params, found, mean_x, RateReading(neuron))
        if isinstance(forward, RateForward):
            residual = solved.residual
        else:
            residual = relative_residual(rate_map(constants, found), found, batch_axis)
    rates = _implicit(rate_map, adjoint, constants, rates, probe)
    if returns == "spikes":
        rates = jax.tree.map(lambda r, s: r + jax.lax.stop_gradient(s - r), rates, found)
    return Equilibrium(rates, residual, num_steps, settled & (worst(residual) <= tolerance), aux)
