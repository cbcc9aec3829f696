"""Accuracy by the equivalent path and by pure spikes, residuals and firing rates, exact over a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mpisjax import configuration
from mpisjax.baselines import bptt
from mpisjax.data import Batch, eval_batches
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import synapses, synops
from mpisjax.training.devices import (
    batch_sharding,
    make_mesh,
    replicated,
    reshard,
    shard_channels,
    state_sharding,
)
from mpisjax.training.step import prepare_images

Array = jax.Array


class Evaluation(NamedTuple):
    """What was measured over a split.

    Attributes:
      accuracy: by the equivalent path, one step of the rate map on what the forward found; of a network trained
        through time, by the readout it was trained with.
      accuracy_spikes: by the spikes' own rates; None where the rates were solved for.
      loss: cross-entropy of the same logits.
      residual: by stream, mean relative residual.
      firing_rates: by population, spikes counted per neuron and time step; where the rates were solved for, their mean.
      synops: mean synaptic operations a sample, over all steps and layers that spikes drive
        (`mpisjax.nn.operations`); None where the rates were solved for.
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
    config: ml_collections.ConfigDict,
    net: MPIS,
    dataset: Any,
    mesh: jax.sharding.Mesh,
    num_steps: int | None = None,
    mode: str = "spikes",
) -> Callable[[dict[str, Any], Batch], dict[str, Any]]:
    """`step(variables, batch)` -> sums over the batch's real rows, to be added up over batches.

    Args:
      config: all settings.
      net: the network.
      dataset: normalisation and kind of input.
      mesh: devices that share the batch.
      num_steps: time steps; None: `forward.num_steps`.
      mode: "spikes" or "rates" (solve for the equilibrium by the rate map to a tight tolerance).
    """
    net = shard_channels(net, mesh)
    neuron = configuration.make_neuron(config)
    forward = configuration.make_spike_forward(config, dataset.temporal, num_steps)
    through_time = configuration.make_bptt(config)
    height, width, channels = dataset.train.images.shape[-3:]
    links = synapses(net, (height, width, channels))

    def step(variables: dict[str, Any], batch: Batch) -> dict[str, Any]:
        x = prepare_images(batch.images, dataset)
        mask = batch.mask

        def total(by_sample: Array) -> Array:
            return jnp.sum(by_sample * mask)

        if mode == "rates":
            solver = configuration.make_evaluation_solver(config)
            out = model.apply(net, variables, x, neuron=neuron, forward=solver)
            found, steps, spike_logits = out.equilibrium.rates, out.equilibrium.num_steps, None
        else:
            simulation = model.spikes(net, variables, x, neuron=neuron, forward=forward)
            found, steps = simulation.rates, simulation.num_steps
            spike_logits = model.classify(net, variables, found)
        rates, layer_rates, residual = model.equivalent_step(net, variables, x, found, neuron)
        if mode == "spikes":
            # Counts, not the leak-weighted rates of Eq. 3: these are spikes that were fired.
            layer_rates = {
                name: jnp.mean(count, axis=tuple(range(1, count.ndim))) / steps
                for name, count in simulation.spike_counts.items()
            }
        if through_time is None or mode == "rates":
            logits = model.classify(net, variables, rates)
        else:
            logits = bptt.apply(
                net, variables, x, neuron=neuron, num_steps=forward.num_steps, bptt=through_time
            ).logits
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        sums = {
            "count": jnp.sum(mask),
            "correct": total(jnp.argmax(logits, -1) == batch.labels),
            "loss": total(loss),
            "steps": total(steps * jnp.ones_like(mask)),
            "residual": {k: total(v) for k, v in residual.items()},
            "firing_rates": {
                k: total(jnp.mean(v, axis=tuple(range(1, v.ndim)))) for k, v in layer_rates.items()
            },
        }
        if spike_logits is not None:
            sums["correct_spikes"] = total(jnp.argmax(spike_logits, -1) == batch.labels)
            operations = synops(links, simulation.spike_counts)
            sums["synops"] = sum((total(v) for v in operations.values()), jnp.zeros(()))
        return sums

    whole = replicated(mesh)
    # With an axis "model" the variables come as `state_sharding` lays them.
    given = None if "model" in mesh.axis_names else whole
    return jax.jit(step, in_shardings=(given, batch_sharding(mesh)), out_shardings=whole)


def make_evaluator(
    config: ml_collections.ConfigDict,
    net: MPIS,
    dataset: Any,
    num_steps: int | None = None,
    mode: str = "spikes",
) -> Callable[[dict[str, Any], Any], Evaluation]:
    """`evaluator(variables, split) -> Evaluation`, compiled once however often it is called."""
    mesh = make_mesh(config, config.eval.batch_size)
    step = make_eval_step(config, net, dataset, mesh, num_steps, mode)

    def evaluator(variables: dict[str, Any], split: Any) -> Evaluation:
        variables = reshard(variables, state_sharding(variables, mesh))
        sums: Any = None
        for batch in eval_batches(split, config.eval.batch_size, batch_sharding(mesh)):
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


def evaluate(
    config: ml_collections.ConfigDict,
    net: MPIS,
    variables: dict[str, Any],
    dataset: Any,
    split: Any,
    num_steps: int | None = None,
    mode: str = "spikes",
) -> Evaluation:
    """Measures a network on a split.

    Args:
      config: all settings.
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      dataset: normalisation and kind of input.
      split: examples and labels.
      num_steps: time steps; None: `forward.num_steps`. Input over time has as many as frames.
      mode: "spikes" or "rates".
    """
    return make_evaluator(config, net, dataset, num_steps, mode)(variables, split)
