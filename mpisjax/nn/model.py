"""The model as pure functions: variables in, logits and equilibrium out."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
from jaxtyping import PyTree

from mpisjax.equilibrium import Equilibrium, equilibrium_forward
from mpisjax.firing import RateReading, Transition
from mpisjax.neurons import LIF
from mpisjax.nn.mpis import MPIS, sample_masks
from mpisjax.nn.network import Rates, Variables
from mpisjax.residuals import relative_residual
from mpisjax.simulate import Simulation, SpikeForward, simulate, weighted_mean_frame
from mpisjax.solvers import Adjoint, AdjointStats, RateForward

Array = jax.Array


class Output(NamedTuple):
    """What the model returns.

    Attributes:
      logits: float [batch, num_classes].
      equilibrium: of the streams; see `mpisjax.Equilibrium`.
      batch_stats: running statistics after this pass (the given ones where none were taken).
    """

    logits: Array
    equilibrium: Equilibrium
    batch_stats: PyTree


def init_variables(net: MPIS, rng: Array, images: Array, neuron: LIF) -> Variables:
    """Parameters and running statistics: `{"params": ..., "batch_stats": ...}`.

    Args:
      net: the network.
      rng: a key.
      images: a batch, or zeros like one: [batch, h, w, c], temporal [time, batch, h, w, c].
      neuron: its threshold scales the rate reading.
    """
    return dict(net.init(rng, images, RateReading(neuron)))


def transition_of(net: MPIS) -> Transition[Rates]:
    """The network as `equilibrium_forward` takes it, with running statistics: `params` are all variables."""

    def transition(variables: Any, rates: Any, x: Any, fire: Any) -> Any:
        return net.apply(variables, rates, x, fire, False, method="transition")

    return transition


def apply(
    net: MPIS,
    variables: Variables,
    images: Array,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    adjoint: Adjoint | None = None,
    train: bool = False,
    rng: Array | None = None,
    returns: str = "equivalent",
    probe: AdjointStats | None = None,
    init: Rates | None = None,
) -> Output:
    """Classifies images by the equilibrium of the streams.

    Batch normalisation is affine with running statistics inside the solve and in the Jacobian; in training,
    batch statistics are taken in the one differentiable step (and in stem and head), once.

    Args:
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      images: [batch, h, w, c], temporal [time, batch, h, w, c].
      neuron: neuron constants.
      forward: how the equilibrium is found.
      adjoint: how the backward pass is solved.
      train: batch statistics and dropout.
      rng: key for dropout; needed where `train` and the network drops out.
      returns: see `equilibrium_forward`.
      probe: see `equilibrium_forward`.
      init: rates to start from; zeros by default.
    """
    stats, variables = variables["batch_stats"], dict(variables)
    rates0 = net.initial_rates(images) if init is None else init

    def run(variables: Any, *args: Any, method: str) -> tuple[Any, Any]:
        if not train:
            return net.apply(variables, *args, False, method=method), variables["batch_stats"]
        out, updated = net.apply(variables, *args, True, method=method, mutable=["batch_stats"])
        return out, updated["batch_stats"]

    def step(variables: Any, rates: Any, x: Any, fire: Any) -> tuple[Any, Any]:
        return run(variables, rates, x, fire, method="transition")

    x, stats = run(variables, images, method="encode")
    if train and net.dropout:
        assert rng is not None, "dropout needs an rng"
        batch = images.shape[1 if net.temporal else 0]
        variables["masks"] = sample_masks(net, rng, batch)
    equilibrium = equilibrium_forward(
        transition_of(net),
        {**variables, "batch_stats": stats},
        x,
        rates0,
        neuron=neuron,
        forward=forward,
        adjoint=adjoint,
        time_axis=0 if net.temporal else None,
        step=step if train else None,
        returns=returns,
        probe=probe,
    )
    stats = equilibrium.aux if train else stats
    logits, stats = run({**variables, "batch_stats": stats}, equilibrium.rates, method="classify")
    return Output(logits, equilibrium, stats)


def spikes(net: MPIS, variables: Variables, images: Array, *, neuron: LIF, forward: SpikeForward) -> Simulation:
    """Simulates the spiking network alone, with every population's rate and spike count recorded."""
    x = net.apply(variables, images, False, method="encode")
    return simulate(
        transition_of(net),
        variables,
        x,
        net.initial_rates(images),
        neuron=neuron,
        forward=forward,
        time_axis=0 if net.temporal else None,
        record=True,
    )


def classify(net: MPIS, variables: Variables, rates: Rates) -> Array:
    """The head alone, in evaluation: rates -> logits [batch, num_classes]."""
    return cast(Array, net.apply(variables, rates, False, method="classify"))


def equivalent_step(
    net: MPIS, variables: Variables, images: Array, rates: Any, neuron: LIF
) -> tuple[Any, dict[str, Array], Any]:
    """One step of the equivalent map f, in evaluation.

    Returns:
      `(f(rates), every population's rate by name, ||f(r) - r|| / ||f(r)|| by stream and sample)`.
    """
    x = net.apply(variables, images, False, method="encode")
    x = weighted_mean_frame(x, neuron.leak) if net.temporal else x
    reading = RateReading(neuron)
    stepped = transition_of(net)(variables, rates, x, reading)
    return stepped, reading.activity, relative_residual(stepped, rates)


def parameter_count(variables: Variables) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
