"""The spiking reading over time: the one loop, firing rates, early stop. Memory does not depend on the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from mpisjax import firing
from mpisjax.errors import UserError
from mpisjax.firing import Population, Rates, Transition
from mpisjax.hoisting import hoist
from mpisjax.meshes import carried
from mpisjax.neurons import Neuron
from mpisjax.residuals import by_sample, relative_residual, sample_norms, worst

Activity: TypeAlias = PyTree[Float[Array, "..."]]
Seen = TypeVar("Seen")
Shown = TypeVar("Shown")


@dataclasses.dataclass(frozen=True)
class SpikeForward:
    """Find the equilibrium by simulating the spiking network (the paper's forward).

    Attributes:
      num_steps: time steps T, >= 1; the most that are taken where `tol` is set. None: as many as the input
        has frames.
      tol: None runs all steps. Otherwise a sample whose rates moved by at most `tol`, relative, in every
        stream in one step has settled: its rates are kept as they are, and the simulation ends when every
        sample has settled, or after `num_steps`. While a stream has not fired once, its sample goes on: its
        potentials may still be charging.
      residual_tol: `converged` of a simulation asks for a relative residual of at most this. A simulation
        leaves a residual of order 1/T (and, with a leak, a bias that stays), so it is wider than a solver's.

    Raises:
      UserError: a value is outside its range.
    """

    num_steps: int | None = 30
    tol: float | None = None
    residual_tol: float = 0.25

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"forward.num_steps is {self.num_steps}: a simulation needs at least 1 time step.")
        if self.tol is not None and not self.tol > 0:
            raise UserError(f"forward.tol is {self.tol}: set it above 0, or to None to run every step.")


class Simulation(NamedTuple, Generic[Rates]):
    """What a simulation found.

    Attributes:
      rates: leak-weighted firing rates of the fed-back populations, structure of `init`.
      layer_rates: leak-weighted mean activity of every population by name; empty unless recorded.
      spike_counts: size of the activity of every population by name, summed over time: the number of its spikes, or
        with graded spikes their weight; empty unless recorded.
      num_steps: time steps taken by each sample, int32 [batch] (scalar without a batch axis).
      settled: whether each sample's rates settled to `tol`; all True where `tol` is None. bool [batch].
    """

    rates: Rates
    layer_rates: dict[str, Float[Array, "..."]]
    spike_counts: dict[str, Float[Array, "..."]]
    num_steps: Int[Array, "*batch"]
    settled: Bool[Array, "*batch"]


class Step(NamedTuple):
    """One time step, as an observer sees it.

    Attributes:
      feedback: this step's activity of the fed-back populations, structure of `init`.
      populations: every population by name: its neurons' state after the step, and its activity.
      x: the input of this step.
    """

    feedback: PyTree
    populations: dict[str, firing.Fired]
    x: PyTree


Observer = Callable[[Seen, Step], tuple[Seen, Shown]]
"""`observer(seen, step) -> (seen, shown)`: what is carried from step to step, and what is kept of each."""


class Timing(NamedTuple):
    """How the input meets the time steps.

    Attributes:
      frames: the frames on the leading axis of every leaf; None where the input is constant.
      example: the input of one step: the constant one, or shapes and dtypes.
      num_steps: time steps.
    """

    frames: PyTree
    example: PyTree
    num_steps: int


def as_currents(x: PyTree) -> PyTree:
    """Frames of counts or pixels (bool, and integers of 8 or 16 bits) as float32; anything else as it is.

    Both readings see the same numbers so. Wider integers are taken for indices, which have no mean.
    """

    def current(a: Any) -> Any:
        small = a.dtype == bool or (jnp.issubdtype(a.dtype, jnp.integer) and a.dtype.itemsize <= 2)
        return a.astype(jnp.float32) if small else a

    return jax.tree.map(current, jax.tree.map(jnp.asarray, x))


def timing(x: PyTree, num_steps: int | None, time_axis: int | None) -> Timing:
    """Says how long to simulate, and on what.

    Raises:
      UserError: neither the number of steps nor frames say how long, or they disagree.
    """
    if time_axis is None:
        if num_steps is None:
            raise UserError("forward.num_steps is None but x is constant in time: set the number of time steps.")
        return Timing(None, x, num_steps)
    frames = jax.tree.map(lambda a: jnp.moveaxis(a, time_axis, 0), as_currents(x))
    lengths = {a.shape[0] for a in jax.tree.leaves(frames)}
    if len(lengths) != 1:
        raise UserError(f"x carries {sorted(lengths)} frames in its leaves: give every leaf the same number.")
    (length,) = lengths
    if length == 0:
        raise UserError("x carries 0 frames: give it at least 1.")
    if num_steps not in (None, length):
        raise UserError(
            f"forward.num_steps is {num_steps} but x carries {length} frames: make them equal, or "
            "set forward.num_steps to None."
        )
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), frames)
    return Timing(frames, example, length)


def weighted_mean_frame(x: PyTree, leak: float, time_axis: int = 0) -> PyTree:
    """The constant current that input over time amounts to: sum_t leak^(T-t) x_t / sum_t leak^(T-t).

    Weighted as the firing rates are, so that the rate reading and the simulation agree on the input.

    Args:
      x: pytree of arrays that carry T frames on `time_axis`; see `as_currents` for integers.
      leak: the neuron's leak.
      time_axis: the axis of the frames.

    Raises:
      UserError: a leaf holds indices.
    """

    def mean(frames: Array) -> Array:
        dtype = frames.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(
                f"x carries frames of dtype {dtype}, which are indices and have no mean: give floats, uint8 or uint16."
            )
        steps = frames.shape[time_axis]
        weights = leak ** jnp.arange(steps - 1, -1, -1, dtype=jnp.promote_types(dtype, jnp.float32))
        weights = weights / weights.sum()
        return jnp.tensordot(weights, frames.astype(weights.dtype), (0, time_axis)).astype(dtype)

    return jax.tree.map(mean, as_currents(x))


def accumulate(total: Activity, activity: Activity, leak: float) -> Activity:
    """One step of Eq. 3's weighted sum: `leak * total + activity`, in the total's dtype."""
    return jax.tree.map(lambda t, s: leak * t + s.astype(t.dtype), total, activity)


def firing_rate(total: Activity, weight: Float[Array, "*batch"], batch_axis: int | None = None) -> Activity:
    """The firing rate (Eq. 3): `sum_t leak^(T-t) s_t / sum_t leak^(T-t)`.

    Both sums are carried from step to step (`accumulate`): the closed form of the second is 0/0 at leak = 1.

    Args:
      total: pytree: the weighted sums of activity.
      weight: the sum of the weights: a scalar, or [batch] with a `batch_axis`. Before the first step it is 0, and so is
        the rate.
      batch_axis: the samples' axis of the totals, where the weight is by sample.
    """
    weight = jnp.maximum(weight, 1)
    return jax.tree.map(lambda t: t / by_sample(weight, t, batch_axis).astype(t.dtype), total)


def wide_zeros(like: PyTree) -> Activity:
    """Zeros to sum up activity in: float32 at least."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), like)


def over_time(
    transition: Transition[Rates],
    params: PyTree,
    x: PyTree,
    init: Rates,
    *,
    neuron: Neuron,
    num_steps: int | None,
    observer: Observer[Seen, Shown],
    start: Callable[[dict[str, Population]], Seen],
    time_axis: int | None = None,
    goes_on: Callable[[Seen], Array] | None = None,
    of: Callable[[Neuron], Neuron] = lambda neuron: neuron,
    remat: bool = False,
) -> tuple[Seen, Any]:
    """Runs the spiking network step by step: the one loop over time (Eq. 2 and 11).

    Within a step a layer sees this step's spikes of the layer below; the feedback `rates` argument of the
    transition is the previous step's. It is differentiable wherever the neurons' step is.

    Args:
      transition: `transition(params, rates, x, fire) -> rates`, or one that is traced.
      params: pytree, passed through.
      x: pytree: a constant current, or frames on `time_axis`.
      init: rates pytree: the first step's feedback.
      neuron: of the populations that bring none.
      num_steps: time steps; None: as many as there are frames.
      observer: what is made of each step.
      start: shape and dtype of every population's current, by name -> what the observer has seen before the first step.
      time_axis: None, or the frames' axis in every leaf of `x`.
      goes_on: what was seen -> whether to take another step; None takes all. The steps' own results are not kept then.
      of: what is made of every neuron (a surrogate derivative, say).
      remat: keep only the state between steps and compute each step again in the backward pass.

    Returns:
      `(seen, shown)`: what was seen after the last step, and what was shown, stacked over the steps.
    """
    when = timing(x, num_steps, time_axis)
    fixed = when.frames is None
    first = when.example if fixed else jax.tree.map(lambda a: a[0], when.frames)
    traced, init = firing.trace_transition(transition, params, init, first)
    firing.check_rates("transition", traced.result, init)
    states = firing.initial_states(traced, neuron, params, init, first, of=of)
    rule = firing.spikes(neuron, of)

    def one_step(states: dict[str, Any], feedback: Any, x_t: Any) -> Any:
        x_t = x if fixed else x_t
        return firing.follow(traced, rule, states, params, feedback, x_t)

    step, constants = hoist(one_step, states, init, None if fixed else first)

    def advance(constants: list[Any], carry: Any, x_t: Any) -> Any:
        states, feedback, seen = carry
        feedback, populations = step(constants, states, feedback, x_t)
        seen, shown = observer(seen, Step(feedback, populations, x if fixed else x_t))
        return ({k: p.state for k, p in populations.items()}, feedback, seen), shown

    # The barrier against common subexpressions that checkpoint adds is not needed in a scan, and is slow.
    advance = jax.checkpoint(advance, prevent_cse=False) if remat else advance
    carry = (states, jax.tree.map(jnp.asarray, init), start(traced.populations))
    carry = carried(lambda c: advance(constants, c, None if fixed else first)[0], carry)
    if goes_on is None:
        carry, shown = jax.lax.scan(
            lambda c, x_t: advance(constants, c, x_t),
            carry,
            when.frames,
            length=when.num_steps,
        )
        return carry[2], shown
    counted = jax.lax.while_loop(
        lambda c: goes_on(c[0][2]) & (c[1] < when.num_steps),
        lambda c: (advance(constants, c[0], None)[0], c[1] + 1),
        (carry, jnp.zeros((), jnp.int32)),
    )
    return counted[0][2], None


class _Seen(NamedTuple):
    total: Any  # leak-weighted sum of the fed-back activity
    weight: Array  # sum of the weights leak^(T-t), by sample
    recorded: dict[str, tuple[Array, Array]]  # (leak-weighted sum, count) of every population
    active: Array  # samples that go on
    settled: Array  # samples whose rates did not move by more than the tolerance
    num_steps: Array


def simulate(
    transition: Transition[Rates],
    params: PyTree,
    x: PyTree,
    init: Rates,
    *,
    neuron: Neuron,
    forward: SpikeForward,
    time_axis: int | None = None,
    batch_axis: int | None = 0,
    record: bool = False,
) -> Simulation[Rates]:
    """Runs the spiking network and returns its firing rates (Eq. 2, 3 and 11).

    Args:
      transition: `transition(params, rates, x, fire) -> rates`.
      params: pytree, passed through.
      x: pytree: a constant current, or frames on `time_axis`. Frames of small integers are read as float32.
      init: pytree of arrays that fixes structure, shape and dtype of the fed-back activity; the first step's
        feedback.
      neuron: of the populations that bring none; its leak weights the rates.
      forward: number of steps and early stop.
      time_axis: None or the frames' axis in every leaf of `x`; input over time is not stopped early.
      batch_axis: the samples' axis of every leaf of `init`, or None.
      record: also accumulate every population's rate and spike count.

    Returns:
      A `Simulation`. Memory does not depend on the number of steps.

    Raises:
      UserError: the number of steps and of frames differ, or `tol` is combined with input over time.
    """
    if forward.tol is not None and time_axis is not None:
        raise UserError("forward.tol cannot be combined with input over time: set it to None.")
    init = jax.tree.map(jnp.asarray, init)
    leak, tol = neuron.leak, forward.tol
    batch_shape = () if batch_axis is None else (jax.tree.leaves(init)[0].shape[batch_axis],)

    def start(shapes: dict[str, Population]) -> _Seen:
        return _Seen(
            total=wide_zeros(init),
            weight=jnp.zeros(batch_shape, jnp.result_type(jnp.float32, *jax.tree.leaves(init))),
            recorded={k: (wide_zeros(s), wide_zeros(s)) for k, s in shapes.items()} if record else {},
            active=jnp.ones(batch_shape, bool),
            settled=jnp.full(batch_shape, tol is None),
            num_steps=jnp.zeros(batch_shape, jnp.int32),
        )

    # Where samples stop by themselves, one has to know the axis on which a recorded population holds them.
    populations = firing.trace(transition, params, init, x).populations if record and tol is not None else {}

    def axis_of(name: str) -> int | None:
        return batch_axis if batch_axis is None or batch_axis < 0 else batch_axis + populations[name].scans

    def among(active: Array, new: Any, old: Any, axis: int | None) -> Any:
        if tol is None:
            return new
        return jax.tree.map(lambda a, b: jnp.where(by_sample(active, a, axis), a, b), new, old)

    def observe(seen: _Seen, step: Step) -> tuple[_Seen, None]:
        active = seen.active
        weight = jnp.where(active, leak * seen.weight + 1, seen.weight)
        total = among(active, accumulate(seen.total, step.feedback, leak), seen.total, batch_axis)
        recorded = {}
        for k, old in seen.recorded.items():
            s = step.populations[k].activity
            new = accumulate(old[0], s, leak), accumulate(old[1], jnp.abs(s), 1.0)
            recorded[k] = new if tol is None else among(active, new, old, axis_of(k))
        steps, settled = seen.num_steps + active.astype(jnp.int32), seen.settled
        if tol is not None:
            now, before = (
                firing_rate(total, weight, batch_axis),
                firing_rate(seen.total, seen.weight, batch_axis),
            )
            moved = worst(relative_residual(now, before, batch_axis))
            # The first step moves from nothing: it settles no one.
            settled = jnp.where(active, (moved <= tol) & (steps > 1), settled)
            quietest = -worst(jax.tree.map(jnp.negative, sample_norms(total, batch_axis)))
            active = active & ~(settled & (quietest > 0))
        return _Seen(total, weight, recorded, active, settled, steps), None

    seen, _ = over_time(
        transition,
        params,
        x,
        init,
        neuron=neuron,
        num_steps=forward.num_steps,
        observer=observe,
        start=start,
        time_axis=time_axis,
        goes_on=None if tol is None else lambda seen: jnp.any(seen.active),
    )
    rates = firing_rate(seen.total, seen.weight, batch_axis)
    return Simulation(
        rates=jax.tree.map(lambda r, i: r.astype(i.dtype), rates, init),
        layer_rates={
            # Without an early stop all weights are equal.
            k: firing_rate(total, jnp.max(seen.weight)) if tol is None else firing_rate(total, seen.weight, axis_of(k))
            for k, (total, _) in seen.recorded.items()
        },
        spike_counts={k: count for k, (_, count) in seen.recorded.items()},
        num_steps=seen.num_steps,
        settled=seen.settled,
    )
