"""`equilibrium_forward`: the equilibrium of a spiking network, differentiated implicitly.

Source: "Efficient Training of Spiking Neural Networks with Multi-Parallel Implicit Stream Architecture"
(MPIS-SNNs), Eq. 2-5, 8, 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from mpisjax import firing
from mpisjax.errors import UserError
from mpisjax.firing import EquivalentStep, Rates, Transition
from mpisjax.hoisting import detach, hoist
from mpisjax.implicit import Constants, Problem, at_equilibrium
from mpisjax.meshes import explicit_axes, in_automatic_mode, layout
from mpisjax.neurons import IF, Neuron
from mpisjax.residuals import relative_residual, worst
from mpisjax.simulate import Simulation, SpikeForward, simulate, weighted_mean_frame
from mpisjax.solvers import Adjoint, AdjointStats, RateForward, solve_rates


class Equilibrium(NamedTuple, Generic[Rates]):
    """An equilibrium of a transition.

    `rates`, `layer_rates` and `aux` carry the whole gradient, in both modes and to any order. `residual`, `num_steps`
    and `converged` report on the forward solve and have no gradient.

    Attributes:
      rates: firing rates, pytree like `init`.
      residual: ||f(r) - r|| / ||f(r)|| of the rates the forward found, by stream and sample: pytree like `init`
        with float leaves of shape [batch] (scalars without a batch axis).
      num_steps: int32 scalar: time steps simulated, or evaluations of f by the solver; the most of any sample.
      converged: bool [batch] (scalar without a batch axis): every stream's residual is within the forward's
        tolerance, and with an early stop the rates settled. Never raises; NaN counts as not converged.
      layer_rates: the firing rate of every population at the equilibrium, by name, in the shape of its current.
      aux: what `step` returned beside the rates; None without `step`.
    """

    rates: Rates
    residual: PyTree[Float[Array, "*batch"]]
    num_steps: Int[Array, ""]
    converged: Bool[Array, "*batch"]
    layer_rates: dict[str, Float[Array, "..."]]
    aux: PyTree = None


class _Layouts(NamedTuple):
    """An `Equilibrium` of how things lie on a mesh."""

    rates: Any
    residual: Any
    num_steps: Any
    converged: Any
    layer_rates: Any
    aux: Any


def _check_fires(traced: firing.Traced, params: Any, init: Any, x: Any) -> None:
    """Refuses a transition whose rates are no neurons' activity."""
    if not traced.populations:
        raise UserError(
            "the transition never calls fire: every population of neurons is a call fire(name, current) in it."
        )
    tags = [tag for tag, tree in (("params", params), ("rates", init), ("x", x)) for _ in jax.tree.leaves(tree)]
    seen = firing.sources(traced, tags)
    paths = [jax.tree_util.keystr(path) or "rates" for path, _ in jax.tree_util.tree_leaves_with_path(init)]
    # Rates that are handed on from the step before (a delay) are activity as well.
    strange = [
        path
        for path, found in zip(paths, seen, strict=True)
        if "fire" not in found and ("rates" not in found or "x" in found)
    ]
    if strange or not any("fire" in found for found in seen):
        raise UserError(
            f"the transition returns {', '.join(strange or paths)} without calling fire on the way: return activity, "
            "what fire(name, current) gives."
        )


def _check_batch(init: Any, batch_axis: int | None) -> None:
    leaves = jax.tree.leaves(init)
    if not leaves:
        raise UserError("init holds no arrays: give it one for every stream of rates.")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"init holds {leaf.dtype}{list(leaf.shape)}: rates are floats.")
        if batch_axis is not None and not -leaf.ndim <= batch_axis < leaf.ndim:
            raise UserError(
                f"batch_axis is {batch_axis} but init holds an array of shape {list(leaf.shape)}: name the axis of the "
                "samples, or None if there is none."
            )
        if 0 in leaf.shape:
            raise UserError(
                f"init holds an array of shape {list(leaf.shape)}, which is empty: give it at least one sample and one "
                "neuron."
            )
    if batch_axis is not None:
        sizes = sorted({leaf.shape[batch_axis] for leaf in leaves})
        if len(sizes) > 1:
            raise UserError(
                f"init holds {sizes} samples on batch_axis {batch_axis} of its leaves: give all the same number, or "
                "set batch_axis to None."
            )


def _check_instance(name: str, value: Any, kinds: tuple[type, ...], example: str) -> None:
    if not isinstance(value, kinds):
        told = value.__name__ if isinstance(value, type) else repr(value)
        raise UserError(f"{name} is {told}: pass an instance, such as {example}.")


def _without_static(params: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays in `params`, and how to put them back among what is no array (functions, Python numbers, strings)."""
    leaves, structure = jax.tree.flatten(params)
    arrays = [leaf for leaf in leaves if firing.is_array(leaf)]

    def whole(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        return jax.tree.unflatten(structure, [next(remaining) if firing.is_array(leaf) else leaf for leaf in leaves])

    return arrays, whole


def equilibrium_forward(
    transition: Transition[Rates],
    params: PyTree,
    x: PyTree,
    init: Rates,
    *,
    neuron: Neuron | None = None,
    forward: SpikeForward | RateForward | None = None,
    adjoint: Adjoint | None = None,
    time_axis: int | None = None,
    step: EquivalentStep[Rates] | None = None,
    returns: str = "equivalent",
    batch_axis: int | None = 0,
    probe: AdjointStats | None = None,
) -> Equilibrium[Rates]:
    """Finds the equilibrium firing rates of a spiking network, differentiable without a derivative in time.

    The network is one pure function, read twice: `transition(params, rates, x, fire) -> rates`, in which every
    neuron population is a call `fire(name, current, neuron=None) -> activity`. As spikes, `fire` steps the neurons and
    the transition is simulated (Eq. 2, 11); as rates, `fire` is the neuron's rate, DBReLU for LIF neurons, and the
    transition is the equivalent map f (Eq. 10). Both have the same fixed point. A network of two layers, complete:

        lambda p, z, x, fire: fire("out", fire("hidden", x @ p["in"] + z @ p["back"]) @ p["out"])

    `fire` may stand inside `jit`, `vmap`, `remat`, `cond` and `scan`. In a scan over layers one call is all layers'
    population, with the layer as leading axis.

    Forward: r_T from the simulation or the rate solver, with no derivative taken, then one differentiable
    step r* = f(r_T), the paper's equivalent pathway. Backward (Eq. 5, 8): with g = dL/dr* and J = df/dr at r*,
    solve (I - J^T) v = g; then dL/dtheta = (df/dtheta)^T v through that one step. Memory does not depend on
    the number of time steps.

    Works under `jit`, `grad`, `jvp`, `vmap` (with `batch_axis=None`, or one more batch axis), `shard_map` and sharded
    `jit`. Derivatives of any order are those of the equilibrium, by the implicit function theorem; each is as exact as
    the forward and the adjoint solve are (a phantom gradient's derivative is cut off as the gradient is). Forward mode
    and second derivatives need a transition that allows them: JAX refuses them where it calls a `custom_vjp` function.

    Args:
      transition: the network, as above. It may close over arrays, traced ones included (they get gradients
        too; on a mesh with explicit axes they are refused), but passing them in `params` is plainer.
      params: pytree of whatever the transition needs; float arrays get gradients. What is no array (functions, Python
        numbers, strings) is handed on as it is.
      x: pytree: the input, a constant current; with `time_axis`, T frames. Float leaves get gradients. Frames of small
        integers are read as float32 by both readings; a constant input of integers (indices, say) is kept as it is.
      init: rates pytree of float arrays, zeros as a rule: fixes structure, shape and dtype, and is where the solve
        starts.
      neuron: of the populations that bring none; `IF()` by default. Its leak weights the firing rates.
      forward: `SpikeForward(...)` (the default) or `RateForward(...)`.
      adjoint: `Adjoint(...)`.
      time_axis: None, or the axis of the frames in every leaf of `x`. The rate reading sees the leak-weighted
        mean frame.
      step: the one differentiable step, if it differs from the transition: same arguments, returns
        `(rates, aux)`. Batch normalisation uses it to take batch statistics there and there only.
      returns: "equivalent" for r* = f(r_T), or "spikes" for r_T itself with r*'s gradient.
      batch_axis: the samples' axis in every leaf of `init`: samples are solved, stopped and reported on one by one.
        None if they have none, or if the transition couples its samples: then the batch is one problem.
      probe: `adjoint_probe()`, to learn from its gradient how the adjoint solve went.

    Returns:
      An `Equilibrium`.

    Raises:
      UserError: at trace time, for arguments that do not fit together. Nothing is raised by values.
    """
    neuron = IF() if neuron is None else neuron
    forward = SpikeForward() if forward is None else forward
    adjoint = Adjoint() if adjoint is None else adjoint
    if returns not in ("equivalent", "spikes"):
        raise UserError(f"returns is {returns!r}: choose 'equivalent' or 'spikes'.")
    if not callable(transition) or hasattr(transition, "apply"):
        raise UserError(
            f"the transition is {type(transition).__name__!r}: pass a function (params, rates, x, fire) -> rates; of a "
            "Flax module that is a function that calls its .apply."
        )
    _check_instance("neuron", neuron, (Neuron,), "mpisjax.LIF(leak=0.9)")  # type: ignore[arg-type]
    if isinstance(neuron, type):
        raise UserError(f"neuron is the class {neuron.__name__}: pass an instance, such as mpisjax.LIF(leak=0.9).")
    _check_instance("forward", forward, (SpikeForward, RateForward), "mpisjax.RateForward('picard')")
    _check_instance("adjoint", adjoint, (Adjoint,), "mpisjax.Adjoint('neumann')")
    init = jax.tree.map(jnp.asarray, init)
    _check_batch(init, batch_axis)
    arrays, whole = _without_static(params)
    own, with_arrays = _without_static(neuron)

    def of_arrays(fn: Transition) -> Transition:
        return lambda arrays, rates, x, fire: fn(whole(arrays), rates, x, fire)

    def found(arrays: list[Any], own: list[Any], x: Any, init: Any, probe: AdjointStats | None) -> Equilibrium[Rates]:
        return _found(
            of_arrays(transition),
            None if step is None else of_arrays(step),
            arrays,
            x,
            init,
            probe,
            neuron=with_arrays(own),
            forward=forward,
            adjoint=adjoint,
            time_axis=time_axis,
            returns=returns,
            batch_axis=batch_axis,
        )

    if not explicit_axes():
        return found(arrays, own, x, init, probe)
    mean_x = x if time_axis is None else weighted_mean_frame(x, neuron.leak, time_axis)
    traced, typed = firing.trace_transition(of_arrays(transition), arrays, init, mean_x)
    out = traced if step is None else firing.trace(of_arrays(step), arrays, typed, mean_x)
    if any(isinstance(const, jax.Array) for const in [*traced.consts, *out.consts]):
        raise UserError(
            "the transition closes over JAX arrays, whose types on a mesh with explicit axes do not fit inside the "
            "solve: pass them in params or x, or close over NumPy arrays."
        )
    rates, aux = (out.layouts, None) if step is None else out.layouts
    samples = jax.tree.map(
        lambda p: PartitionSpec() if batch_axis is None else PartitionSpec(p[batch_axis]), traced.layouts
    )
    layouts: Any = _Layouts(
        rates=rates,
        residual=samples,
        num_steps=PartitionSpec(),
        converged=jax.tree.leaves(samples)[0],
        layer_rates={name: layout(struct) for name, struct in out.populations.items()},
        aux=aux,
    )
    return Equilibrium(*in_automatic_mode(lambda *a: _Layouts(*found(*a)), layouts, arrays, own, x, init, probe))


def _found(
    transition: Transition,
    step: EquivalentStep | None,
    arrays: list[Any],
    x: Any,
    init: Any,
    probe: AdjointStats | None,
    *,
    neuron: Neuron,
    forward: SpikeForward | RateForward,
    adjoint: Adjoint,
    time_axis: int | None,
    returns: str,
    batch_axis: int | None,
) -> Equilibrium[Any]:
    """`equilibrium_forward` of what was checked: the forward solve, then the step that carries the gradient."""
    mean_x = x if time_axis is None else weighted_mean_frame(x, neuron.leak, time_axis)
    rated, init = firing.trace_transition(transition, arrays, init, mean_x)
    firing.check_rates("transition", rated.result, init)
    _check_fires(rated, arrays, init, mean_x)
    rate_map, map_constants = hoist(lambda r: _reader(rated, neuron)(arrays, r, mean_x)[0], init)
    one_step, step_constants = hoist(_stepper(rated, step, neuron, arrays, init, mean_x), init)

    fixed, start = jax.lax.stop_gradient((map_constants, init))
    if isinstance(forward, RateForward):
        solved = solve_rates(rate_map, fixed, start, forward, batch_axis)
        found, num_steps, settled = solved.value, jnp.max(solved.num_steps), jnp.ones((), bool)
        tolerance = forward.tol
    else:

        def spikes(arrays: list[Any], x: Any, init: Any) -> Simulation:
            return simulate(
                transition,
                arrays,
                x,
                init,
                neuron=neuron,
                forward=forward,
                time_axis=time_axis,
                batch_axis=batch_axis,
            )

        simulation = detach(spikes, arrays, x, start)
        found, num_steps, settled = simulation.rates, jnp.max(simulation.num_steps), simulation.settled
        tolerance = forward.residual_tol
    found = jax.lax.stop_gradient(found)

    problem = Problem(one_step, rate_map, adjoint, batch_axis)
    constants = Constants(step_constants, map_constants)
    rates, (aux, layer_rates) = at_equilibrium(problem, constants, found, probe)
    if isinstance(forward, RateForward) and step is not None:
        residual = solved.residual
    else:
        better = jax.lax.stop_gradient(rates) if step is None else rate_map(fixed, found)
        residual = relative_residual(better, found, batch_axis)
    if returns == "spikes":
        rates = jax.tree.map(lambda r, s: r + jax.lax.stop_gradient(s - r), rates, found)
    residual = jax.lax.stop_gradient(residual)
    return Equilibrium(rates, residual, num_steps, settled & (worst(residual) <= tolerance), layer_rates, aux)


def _stepper(
    rated: firing.Traced,
    step: EquivalentStep | None,
    neuron: Neuron,
    arrays: list[Any],
    init: Any,
    mean_x: Any,
) -> Callable[[Any], tuple[Any, Any]]:
    """The one differentiable step: rates -> (rates, (aux, rates of every population))."""
    if step is None:

        def of_transition(r: Any) -> tuple[Any, Any]:
            rates, layer_rates = _reader(rated, neuron)(arrays, r, mean_x)
            return rates, (None, layer_rates)

        return of_transition
    traced = firing.trace(step, arrays, init, mean_x)
    firing.check_rates("step", traced.result[0], init)

    def of_step(r: Any) -> tuple[Any, Any]:
        (rates, aux), layer_rates = _reader(traced, neuron)(arrays, r, mean_x)
        return rates, (aux, layer_rates)

    return of_step


def _reader(traced: firing.Traced, neuron: Neuron) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """The rate reading of a traced function: what it returns, and the rate of every population."""
    rule = firing.rates(neuron)
    return lambda *args: firing.follow(traced, rule, {}, *args)
