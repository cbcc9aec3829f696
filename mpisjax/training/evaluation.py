"""What a network reaches on a split: accuracies, residuals, firing rates; and how that is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from mpisjax.baselines import bptt as through_time
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Batch, Inputs, Split, eval_batches, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import synapses, synops
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import RateForward
from mpisjax.training.devices import (
    batch_sharding,
    data_mesh,
    replicated,
    reshard,
    shard_channels,
    state_sharding,
)

Array = jax.Array


class Evaluation(NamedTuple):
    """What was measured over a split.

    Attributes:
      accuracy: by the equivalent path, one step of the rate map on what the forward found; of a network trained
        through time, by the readout it was trained with.
      accuracy_spikes: by the spikes' own rates; None where the rates were solved for.
      loss: cross-entropy of the same logits.
      residual: by stream, mean relative residual ("rates" where the network's rates are one array).
      firing_rates: by population, spikes counted per neuron and time step; where the rates were solved for, their mean.
      synops: mean synaptic operations a sample, over all steps and layers that spikes drive
        (`mpisjax.nn.operations`); None where the rates were solved for, and of a network that is no MPIS.
      num_steps: mean time steps (or solver steps) a sample.
      num_examples: examples.
    """

    accuracy: float
    accuracy_spikes: float | None
    loss: float
    residual: dict[str, float]
    firing_rates: dict[str, float]
    synops: float | None
    num_steps: float
    num_examples: int


def make_eval_step(
    network: Any,
    inputs: Inputs,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    bptt: BPTT | None = None,
    mesh: jax.sharding.Mesh,
) -> Callable[[dict[str, Any], Batch], dict[str, Any]]:
    """`step(variables, batch)` -> sums over the batch's real rows, to be added up over batches.

    Args:
      network: the network.
      inputs: normalisation and kind of input.
      neuron: of the populations that bring none.
      forward: the simulation that is measured, or the solver of the rates.
      bptt: how a network that was trained through time answers; None: by the equivalent path.
      mesh: devices that share the batch.
    """
    network = shard_channels(network, mesh)

    def step(variables: dict[str, Any], batch: Batch) -> dict[str, Any]:
        x = prepare_images(batch.images, inputs)
        mask = batch.mask

        def total(by_sample: Array) -> Array:
            return jnp.sum(by_sample.astype(mask.dtype) * mask)

        if isinstance(forward, RateForward):
            out = model.apply(network, variables, x, neuron=neuron, forward=forward)
            found, steps, spike_logits = out.equilibrium.rates, out.equilibrium.num_steps, None
        else:
            simulation = model.spikes(network, variables, x, neuron=neuron, forward=forward)
            found, steps = simulation.rates, simulation.num_steps
            spike_logits = model.classify(network, variables, found)
        rates, layer_rates, residual = model.equivalent_step(network, variables, x, found, neuron)
        if isinstance(forward, SpikeForward):
            # Counts, not the leak-weighted rates of Eq. 3: these are spikes that were fired.
            layer_rates = {
                name: jnp.mean(count, axis=tuple(range(1, count.ndim))) / steps.astype(count.dtype)
                for name, count in simulation.spike_counts.items()
            }
        if bptt is None or isinstance(forward, RateForward):
            logits = model.classify(network, variables, rates)
        else:
            logits = through_time.apply(
                network, variables, x, neuron=neuron, num_steps=forward.num_steps, bptt=bptt
            ).logits
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        sums = {
            "count": jnp.sum(mask),
            "correct": total(jnp.argmax(logits, -1) == batch.labels),
            "loss": total(loss),
            "steps": total(jnp.broadcast_to(steps, mask.shape)),
            "residual": {
                jax.tree_util.keystr(place, simple=True, separator="/") or "rates": total(value)
                for place, value in jax.tree_util.tree_leaves_with_path(residual)
            },
            "firing_rates": {
                k: total(jnp.mean(v, axis=tuple(range(1, v.ndim)))) for k, v in layer_rates.items()
            },
        }
        if spike_logits is not None:
            sums["correct_spikes"] = total(jnp.argmax(spike_logits, -1) == batch.labels)
            if isinstance(network, MPIS):
                with jax.ensure_compile_time_eval():
                    height, width, channels = batch.images.shape[-3:]
                    links = synapses(network, (height, width, channels))
                operations = synops(links, simulation.spike_counts)
                sums["synops"] = sum((total(v) for v in operations.values()), jnp.zeros(()))
        return sums

    whole = replicated(mesh)
    # With an axis "model" the variables come as `state_sharding` lays them.
    given = None if "model" in mesh.axis_names else whole
    return jax.jit(step, in_shardings=(given, batch_sharding(mesh)), out_shardings=whole)


def make_evaluator(
    network: Any,
    inputs: Inputs,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    bptt: BPTT | None = None,
    batch_size: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[dict[str, Any], Split], Evaluation]:
    """`evaluator(variables, split) -> Evaluation`, compiled once however often it is called.

    Args:
      network: the network.
      inputs: normalisation and kind of input.
      neuron: of the populations that bring none.
      forward: the simulation that is measured, or the solver of the rates.
      bptt: how a network that was trained through time answers; None: by the equivalent path.
      batch_size: examples at once.
      mesh: devices that share a batch; None: all that divide it.
    """
    mesh = data_mesh(batch_size) if mesh is None else mesh
    step = make_eval_step(network, inputs, neuron=neuron, forward=forward, bptt=bptt, mesh=mesh)

    def evaluator(variables: dict[str, Any], split: Split) -> Evaluation:
        variables = reshard(variables, state_sharding(variables, mesh))
        sums: Any = None
        for batch in eval_batches(split, batch_size, batch_sharding(mesh)):
            part = jax.device_get(step(variables, batch))
            sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
        mean = jax.tree.map(lambda s: float(s) / float(sums["count"]), sums)
        return Evaluation(
            accuracy=mean["correct"],
            accuracy_spikes=mean.get("correct_spikes"),
            loss=mean["loss"],
            residual=mean["residual"],
            firing_rates=mean["firing_rates"],
            synops=mean.get("synops"),
            num_steps=mean["steps"],
            num_examples=int(sums["count"]),
        )

    return evaluator


def as_json(score: Any) -> dict[str, Any]:
    """An evaluation as plain numbers; null for one that is not finite.

    Args:
        score: A NamedTuple of numbers and of dicts of numbers (`mpisjax.training.evaluation.Evaluation`).
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, int):
            return value
        return float(value) if value is not None and math.isfinite(value) else None

    return plain(score._asdict())


def readout_name(bptt: Any) -> str:
    """Which way to the answer `accuracy` stands for: a network trained through time has a readout of its own.

    Args:
        bptt: How it was trained through time (`mpisjax.baselines.bptt.BPTT`); None: by its equilibrium.
    """
    if bptt is None:
        return "equivalent path"
    seen = "firing rates" if bptt.readout == "rate" else "mean membrane potentials"
    return f"readout it was trained with, {seen}"


def show(console: Console, title: str, result: Mapping[str, Any], readout: str = "equivalent path") -> None:
    """Prints one evaluation: accuracy and loss, the residual of each stream, the firing rate of each layer.

    Args:
        console: Where to.
        title: What was evaluated.
        result: What `as_json` gave.
        readout: What `accuracy` and `loss` are by; see `readout_name`.
    """
    console.print(title, style="italic", highlight=False, markup=False)
    main = Table(show_header=False)
    main.add_column("", style="bold")
    main.add_column("", justify="right")
    main.add_row(f"accuracy, {readout}", percent(result["accuracy"]))
    if result["accuracy_spikes"] is not None:
        main.add_row(
            f"accuracy, spikes alone, T = {result['num_steps']:g}", percent(result["accuracy_spikes"])
        )
    main.add_row(f"loss, {readout}", number(result["loss"]))
    if result["synops"] is not None:
        main.add_row("synaptic operations a sample", f"{result['synops']:,.0f}")
    for stream, residual in result["residual"].items():
        main.add_row(f"residual, {stream}", number(residual))
    console.print(main)
    rates = Table()
    rates.add_column("layer", style="bold")
    rates.add_column("mean firing rate (spikes per neuron and time step)", justify="right")
    for layer, rate in result["firing_rates"].items():
        rates.add_row(layer, number(rate))
    console.print(rates)


def show_steps(
    console: Console, results: Sequence[Mapping[str, Any]], readout: str = "equivalent path"
) -> None:
    """Prints accuracy, residual, firing rate and synaptic operations against the number of time steps T.

    Args:
        console: Where to.
        results: What `as_json` gave, one for each T.
        readout: What `accuracy` is by; see `readout_name`.
    """
    table = Table()
    for name in (
        "T",
        readout,
        "spikes alone",
        "largest residual",
        "firing rate, mean of layers",
        "SynOps a sample",
    ):
        table.add_column(name, justify="right")
    for result in results:
        residuals = [value for value in result["residual"].values() if value is not None]
        rates = [value for value in result["firing_rates"].values() if value is not None]
        table.add_row(
            f"{result['num_steps']:g}",
            percent(result["accuracy"]),
            percent(result["accuracy_spikes"]),
            number(max(residuals)) if residuals else "-",
            number(sum(rates) / len(rates)) if rates else "-",
            f"{result['synops']:,.0f}" if result["synops"] is not None else "-",
        )
    console.print(table)


def percent(share: float | None) -> str:
    """A share in per cent."""
    return "not finite" if share is None else f"{100 * share:.2f}%"


def number(value: float | None) -> str:
    """A number with four digits."""
    return "not finite" if value is None else f"{value:.4g}"
