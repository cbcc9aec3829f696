"""The spiking reading of a transition: `lax.scan` over time steps, constant memory, optional early stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError
from mpisjax.hoisting import hoist
from mpisjax.neurons import LIF, SpikeReading, population_shapes, resting_potentials
from mpisjax.residuals import relative_residual, sample_norms, worst

Array = jax.Array


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
            raise UserError(
                f"forward.num_steps is {self.num_steps}: a simulation needs at least 1 time step."
            )
        if self.tol is not None and not self.tol > 0:
            raise UserError(f"forward.tol is {self.tol}: set it above 0, or to None to run every step.")


class Simulation(NamedTuple):
    """What a simulation found.

    Attributes:
      rates: leak-weighted firing rates of the fed-back populations, structure of `init`.
      layer_rates: leak-weighted mean activity of every population by name; empty unless recorded.
      spike_counts: plain number of spikes of every population by name, summed over time; as above.
      num_steps: time steps taken by each sample, int32 [batch] (scalar without a batch axis).
      settled: whether each sample's rates settled to `tol`; all True where `tol` is None. bool [batch].
    """

    rates: Any
    layer_rates: dict[str, Array]
    spike_counts: dict[str, Array]
    num_steps: Array
    settled: Array


class _Carry(NamedTuple):
    # Membrane potentials before spike and reset: a CPU then writes each in one pass, in place. What the next step starts
    # from would be a second one, and a copy, since the spikes are of the potential too.
    integrated: dict[str, Array]
    spikes: Any
    total: Any  # leak-weighted spike sum of the fed-back populations
    weight: Array  # sum of the weights leak^(T-t), by sample
    recorded: dict[str, tuple[Array, Array]]  # (leak-weighted sum, count) of every population
    active: Array  # samples that go on
    settled: Array  # samples whose rates did not move by more than the tolerance
    num_steps: Array


def weighted_mean_frame(x: Any, leak: float, time_axis: int = 0) -> Any:
    """The constant current that input over time amounts to: sum_t leak^(T-t) x_t / sum_t leak^(T-t).

    Weighted as the firing rates are, so that the rate reading and the simulation agree on the input.

    Args:
      x: pytree of arrays that carry T frames on `time_axis`; integers become float32.
      leak: the neuron's leak.
      time_axis: the axis of the frames.
    """

    def mean(frames: Array) -> Array:
        dtype = frames.dtype if jnp.issubdtype(frames.dtype, jnp.floating) else jnp.float32
        steps = frames.shape[time_axis]
        weights = leak ** jnp.arange(steps - 1, -1, -1, dtype=jnp.promote_types(dtype, jnp.float32))
        weights = weights / weights.sum()
        return jnp.tensordot(weights, frames.astype(weights.dtype), (0, time_axis)).astype(dtype)

    return jax.tree.map(mean, x)


def _before_reset(neuron: LIF, potentials: dict[str, Array]) -> dict[str, Array]:
    """Membrane potentials from which `neuron.reset` makes these (at a leak below 1, to rounding)."""

    def before(u: Array) -> Array:
        u = u / neuron.leak
        return jnp.where(u >= neuron.threshold, u + neuron.threshold, u)

    return {k: before(u) for k, u in potentials.items()}


def _by_sample(values: Array, like: Array, batch_axis: int | None) -> Array:
    """[batch] values, shaped to broadcast against `like`."""
    if batch_axis is None:
        return values
    shape = [1] * like.ndim
    shape[batch_axis] = -1
    return values.reshape(shape)


def simulate(
    transition: Callable[..., Any],
    params: Any,
    x: Any,
    init: Any,
    *,
    neuron: LIF,
    forward: SpikeForward,
    time_axis: int | None = None,
    batch_axis: int | None = 0,
    record: bool = False,
) -> Simulation:
    """Runs the spiking network and returns its firing rates (Eq. 2, 3 and 11).

    Within a step a layer sees this step's spikes of the layer below; the feedback `rates` argument of the
    transition is the previous step's. The firing rate is `r_T = sum_t leak^(T-t) s_t / sum_t leak^(T-t)`; the
    running weight is carried along, since the closed form of the denominator is 0/0 at leak = 1.

    Args:
      transition: `transition(params, rates, x, fire) -> rates`.
      params: pytree, passed through.
      x: pytree: a constant current, or frames on `time_axis`.
      init: pytree of arrays that fixes structure, shape and dtype of the fed-back activity; the first step's
        feedback.
      neuron: the neuron's constants.
      forward: number of steps and early stop.
      time_axis: None or the frames' axis in every leaf of `x`; input over time is not stopped early.
      batch_axis: the samples' axis of every leaf of `init`, or None.
      record: also accumulate every population's rate and spike count.

    Returns:
      A `Simulation`. Memory does not depend on the number of steps.

    Raises:
      UserError: the number of steps and of frames differ, or `tol` is combined with input over time.
    """
    frames = None
    if time_axis is not None:
        frames = jax.tree.map(lambda a: jnp.moveaxis(a, time_axis, 0), x)
        lengths = {a.shape[0] for a in jax.tree.leaves(frames)}
        if len(lengths) != 1:
            raise UserError(
                f"x carries {sorted(lengths)} frames in its leaves: give every leaf the same number."
            )
        (length,) = lengths
        if forward.num_steps not in (None, length):
            raise UserError(
                f"forward.num_steps is {forward.num_steps} but x carries {length} frames: make them equal, or "
                "set forward.num_steps to None."
            )
        if forward.tol is not None:
            raise UserError("forward.tol cannot be combined with input over time: set it to None.")
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), frames)
        num_steps = length
    elif forward.num_steps is None:
        raise UserError("forward.num_steps is None but x is constant in time: set the number of time steps.")
    else:
        example, num_steps = x, forward.num_steps

    shapes = population_shapes(transition, params, init, example)
    batch_shape = () if batch_axis is None else (jax.tree.leaves(init)[0].shape[batch_axis],)

    def one_step(integrated: dict[str, Array], spikes: Any, x_t: Any) -> Any:
        fire = SpikeReading(neuron, {k: neuron.reset(u) for k, u in integrated.items()})
        spikes = transition(params, spikes, x if frames is None else x_t, fire)
        return fire.integrated, spikes, fire.activity if record else {}

    integrated = _before_reset(neuron, resting_potentials(neuron, shapes))
    step, constants = hoist(one_step, integrated, init, None if frames is None else example)

    def advance(carry: _Carry, x_t: Any) -> _Carry:
        integrated, spikes, fired = step(constants, carry.integrated, carry.spikes, x_t)
        active = carry.active
        weight = jnp.where(active, neuron.leak * carry.weight + 1, carry.weight)

        def accumulate(total: Array, s: Array) -> Array:
            new = neuron.leak * total + s
            return new if forward.tol is None else jnp.where(_by_sample(active, s, batch_axis), new, total)

        def count(total: Array, s: Array) -> Array:
            return total + (
                s if forward.tol is None else s * _by_sample(active, s, batch_axis).astype(s.dtype)
            )

        total = jax.tree.map(accumulate, carry.total, spikes)
        recorded = {
            k: (accumulate(carry.recorded[k][0], s), count(carry.recorded[k][1], s)) for k, s in fired.items()
        }
        steps, settled = carry.num_steps + active, carry.settled
        if forward.tol is not None:
            moved = worst(
                relative_residual(_rates(total, weight), _rates(carry.total, carry.weight), batch_axis)
            )
            # The first step moves from nothing: it settles no one.
            settled = jnp.where(active, (moved <= forward.tol) & (steps > 1), settled)
            quietest = -worst(jax.tree.map(jnp.negative, sample_norms(total, batch_axis)))
            active = active & ~(settled & (quietest > 0))
        return _Carry(integrated, spikes, total, weight, recorded, active, settled, steps)

    def _rates(total: Any, weight: Array) -> Any:
        weight = jnp.maximum(weight, 1)
        return jax.tree.map(lambda t: t / _by_sample(weight, t, batch_axis).astype(t.dtype), total)

    def sums(like: Any) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), like)

    carry = _Carry(
        integrated=integrated,
        spikes=init,
        total=sums(init),
        weight=jnp.zeros(batch_shape),
        recorded={k: (sums(s), sums(s)) for k, s in shapes.items()} if record else {},
        active=jnp.ones(batch_shape, bool),
        settled=jnp.full(batch_shape, forward.tol is None),
        num_steps=jnp.zeros(batch_shape, jnp.int32),
    )
    if forward.tol is None:
        length = None if frames is not None else num_steps
        carry, _ = jax.lax.scan(lambda c, x_t: (advance(c, x_t), None), carry, frames, length=length)
    else:

        def unsettled(carry: _Carry) -> Array:
            return jnp.any(carry.active) & (jnp.max(carry.num_steps) < num_steps)

        carry = jax.lax.while_loop(unsettled, lambda c: advance(c, None), carry)
    rates = jax.tree.map(lambda r, i: r.astype(i.dtype), _rates(carry.total, carry.weight), init)
    return Simulation(
        rates=rates,
        layer_rates=_rates({k: total for k, (total, _) in carry.recorded.items()}, carry.weight),
        spike_counts={k: n for k, (_, n) in carry.recorded.items()},
        num_steps=carry.num_steps,
        settled=carry.settled,
    )
