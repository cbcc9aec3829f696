"""Backpropagation through time: the simulation, differentiated step by step with a surrogate gradient.

The same transition and the same neuron as `equilibrium_forward` takes; memory grows with the number of steps,
which is what the implicit method is there to avoid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax import firing
from mpisjax.baselines import anytime
from mpisjax.baselines.surrogates import check_surrogate, with_surrogate
from mpisjax.equilibrium import Equilibrium
from mpisjax.errors import UserError
from mpisjax.firing import RateReading
from mpisjax.hoisting import detach
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS, sample_masks
from mpisjax.residuals import relative_residual, worst
from mpisjax.simulate import (
    SpikeForward,
    Step,
    accumulate,
    firing_rate,
    over_time,
    timing,
    weighted_mean_frame,
    wide_zeros,
)

Array = jax.Array
READOUTS = ("rate", "membrane")


@dataclasses.dataclass(frozen=True)
class BPTT:
    """How a simulation is differentiated through time.

    Attributes:
      surrogate: stands for the spike's derivative: "rectangular", "triangular", "arctan" or "sigmoid".
      readout: what the classifier sees of the fed-back populations: "rate", the leak-weighted firing rate, or
        "membrane", the leak-weighted mean of the membrane potential before reset, in thresholds.
      remat: keep only the state between steps and compute each step again in the backward pass: less memory a
        step, one more forward.
      times: low latency: in training, the logits after each of these numbers of steps, rising, as (1, 2, 4); see
        `mpisjax.baselines.anytime`. Empty: those after the last step.

    Raises:
      UserError: there is no such surrogate or readout, or the times do not rise.
    """

    surrogate: str = "triangular"
    readout: str = "rate"
    remat: bool = False
    times: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.times:
            anytime.check_times(self.times)
            if self.readout != "rate":
                raise UserError(f"bptt.times reads rates, but bptt.readout is {self.readout!r}: set it to 'rate'.")
        check_surrogate(self.surrogate)
        if self.readout not in READOUTS:
            raise UserError(f"bptt.readout is {self.readout!r}: choose 'rate' or 'membrane'.")


class Unrolled(NamedTuple):
    """A differentiable simulation.

    Attributes:
      rates: leak-weighted firing rates of the fed-back populations, structure of `init`.
      readout: what the classifier sees: `rates`, or their mean membrane potentials; structure of `init`.
    """

    rates: Any
    readout: Any


def unroll(
    transition: Callable[..., Any],
    params: Any,
    x: Any,
    init: Any,
    *,
    neuron: LIF,
    num_steps: int | None,
    bptt: BPTT,
    time_axis: int | None = None,
) -> Unrolled:
    """Simulates a transition, differentiably in `params` and `x`.

    Args:
      transition: `transition(params, rates, x, fire) -> rates`, as for `equilibrium_forward`.
      params: pytree, passed through.
      x: pytree: a constant current, or frames on `time_axis`.
      init: rates pytree: structure, shape and dtype; the first step's feedback.
      neuron: the neuron's constants.
      num_steps: time steps; None: as many as `x` has frames.
      bptt: surrogate, readout, rematerialisation.
      time_axis: None, or the frames' axis in every leaf of `x`.

    Returns:
      An `Unrolled`; its rates are those of `mpisjax.simulate`.

    Raises:
      UserError: neither `num_steps` nor frames say how long to simulate, or they disagree.
    """
    if time_axis is None and (num_steps is None or num_steps < 1):
        raise UserError(f"forward.num_steps is {num_steps}: a simulation needs at least 1 time step.")
    membranes = bptt.readout == "membrane"
    leak = neuron.leak

    def start(shapes: dict[str, Any]) -> Any:
        return (
            wide_zeros(init),
            wide_zeros(shapes) if membranes else {},
            jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(init))),
        )

    def observe(seen: Any, step: Step) -> tuple[Any, None]:
        total, potentials, weight = seen
        if membranes:
            now = {k: fired.state.membrane for k, fired in step.populations.items()}
            potentials = accumulate(potentials, now, leak)
        return (accumulate(total, step.feedback, leak), potentials, leak * weight + 1), None

    (total, potentials, weight), _ = over_time(
        transition,
        params,
        x,
        init,
        neuron=neuron,
        num_steps=num_steps,
        observer=observe,
        start=start,
        time_axis=time_axis,
        of=with_surrogate(bptt.surrogate),
        remat=bptt.remat,
    )
    mean = jax.tree.map(lambda r, like: r.astype(like.dtype), firing_rate(total, weight), init)
    if not membranes:
        return Unrolled(mean, mean)
    # The transition itself says which populations are fed back, and in which structure.
    means = firing_rate(potentials, weight)
    when = timing(x, num_steps, time_axis)
    first = x if when.frames is None else jax.tree.map(lambda a: a[0], when.frames)

    def mean_potential(name: str, own: Any, current: Array, state: Any) -> tuple[Array, None]:
        return means[name].astype(current.dtype), None

    traced = firing.trace(transition, params, init, first)
    return Unrolled(mean, firing.follow(traced, mean_potential, {}, params, init, first)[0])


def apply(
    net: MPIS,
    variables: dict[str, Any],
    images: Array,
    *,
    neuron: LIF,
    num_steps: int | None,
    bptt: BPTT,
    train: bool = False,
    rng: Array | None = None,
) -> model.Output:
    """Classifies images by a simulation that can be differentiated through time.

    Batch normalisation is affine with running statistics in every step, as it is in the simulation that
    evaluates the net; in training, the batch's statistics at the mean activity update the running ones, once
    (as the implicit method's do), and stem and head take batch statistics. Statistics of single steps would
    not do: where a layer is still silent their variance is zero and their gradient explodes.

    Args:
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      images: [batch, h, w, c], temporal [time, batch, h, w, c].
      neuron: neuron constants.
      num_steps: time steps; temporal input has as many as frames.
      bptt: surrogate, readout, rematerialisation.
      train: batch statistics and dropout.
      rng: key for dropout; needed where `train` and the network drops out.

    Returns:
      A `model.Output`, in training with `bptt.times` its logits [len(times), batch, num_classes]; its equilibrium holds
      the simulation's rates and their residual, and has "converged" as a simulation does.
    """
    if train and bptt.times:
        given: dict[str, Any] = {"times": bptt.times, "surrogate": bptt.surrogate, "remat": bptt.remat}
        return anytime.apply(net, variables, images, neuron=neuron, rng=rng, **given)
    stats, variables = variables["batch_stats"], dict(variables)

    def run(variables: Any, *args: Any, method: str) -> tuple[Any, Any]:
        if not train:
            return net.apply(variables, *args, False, method=method), variables["batch_stats"]
        out, updated = net.apply(variables, *args, True, method=method, mutable=["batch_stats"])
        return out, updated["batch_stats"]

    x, stats = run(variables, images, method="encode")
    if train and net.dropout:
        assert rng is not None, "dropout needs an rng"
        variables["masks"] = sample_masks(net, rng, images.shape[1 if net.temporal else 0])
    variables["batch_stats"] = stats
    unrolled = unroll(
        model.transition_of(net),
        variables,
        x,
        net.initial_rates(images),
        neuron=neuron,
        num_steps=None if net.temporal else num_steps,
        bptt=bptt,
        time_axis=0 if net.temporal else None,
    )

    def at_the_mean(variables: Any, rates: Any, x: Any) -> Any:
        mean_x = weighted_mean_frame(x, neuron.leak) if net.temporal else x
        fixed = net.apply(variables, rates, mean_x, RateReading(neuron), False, method="transition")
        _, stats = run(variables, rates, mean_x, RateReading(neuron), method="transition")
        return relative_residual(fixed, rates), stats

    residual, stats = detach(at_the_mean, variables, unrolled.rates, x)
    logits, stats = run({**variables, "batch_stats": stats}, unrolled.readout, method="classify")
    steps = images.shape[0] if net.temporal else num_steps
    converged = worst(residual) <= SpikeForward().residual_tol
    return model.Output(
        logits, Equilibrium(unrolled.rates, residual, jnp.asarray(steps, jnp.int32), converged, {}), stats
    )
