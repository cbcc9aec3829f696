"""What a network reaches on a split: accuracies, residuals, firing rates, and its answer to each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpisjax.baselines import bptt as through_time
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Batch, Inputs, Split, eval_batches, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.operations import count_operations
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import RateForward
from mpisjax.training.devices import batch_sharding, data_mesh, replicated, reshard, shard_channels, state_sharding
from mpisjax.training.metrics import plain

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
      synops: mean synaptic operations a sample, over all steps and populations (`mpisjax.nn.operations`); None where
        the rates were solved for, and of a network that cannot be followed there.
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


class Examination(NamedTuple):
    """What was measured over a split, example by example too.

    Attributes:
      evaluation: the means.
      answers: int32 [n], the class that each example was taken for; of these is `evaluation.accuracy`.
      confidence: float32 [n], the probability of that class.
      synops: by population, mean synaptic operations a sample; empty where the evaluation's are None.
    """

    evaluation: Evaluation
    answers: np.ndarray
    confidence: np.ndarray
    synops: dict[str, float]


def make_eval_step(
    network: Any,
    inputs: Inputs,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    bptt: BPTT | None = None,
    mesh: jax.sharding.Mesh,
) -> Callable[[dict[str, Any], Batch], tuple[dict[str, Any], tuple[Array, Array]]]:
    """`step(variables, batch)` -> sums over the batch's real rows, to be added up over batches, and each row's answer.

    `make_examiner` says what the arguments are.
    """
    network = shard_channels(network, mesh)

    def step(variables: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], tuple[Array, Array]]:
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
        elif bptt.readout == "rate":
            logits = model.classify(network, variables, found)  # of the same spikes
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
            "firing_rates": {k: total(jnp.mean(v, axis=tuple(range(1, v.ndim)))) for k, v in layer_rates.items()},
        }
        if spike_logits is not None:
            sums["correct_spikes"] = total(jnp.argmax(spike_logits, -1) == batch.labels)
            operations = count_operations(network, variables, x, neuron)
            if operations is not None:
                sums["synops"] = {k: total(v) for k, v in operations.synops(simulation.spike_counts).items()}
        return sums, (jnp.argmax(logits, -1), jnp.max(jax.nn.softmax(logits), -1))

    whole = replicated(mesh)
    # With an axis "model" the variables come as `state_sharding` lays them.
    given = None if "model" in mesh.axis_names else whole
    return jax.jit(step, in_shardings=(given, batch_sharding(mesh)), out_shardings=whole)


def make_examiner(
    network: Any,
    inputs: Inputs,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    bptt: BPTT | None = None,
    batch_size: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[dict[str, Any], Split], Examination]:
    """`examiner(variables, split) -> Examination`, compiled once however often it is called.

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

    def examiner(variables: dict[str, Any], split: Split) -> Examination:
        variables = reshard(variables, state_sharding(variables, mesh))
        sums: Any = None
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in eval_batches(split, batch_size, batch_sharding(mesh)):
            part, answered = jax.device_get(step(variables, batch))
            sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
            rows.append(answered)
        mean = jax.tree.map(lambda s: float(s) / float(sums["count"]), sums)
        evaluation = Evaluation(
            accuracy=mean["correct"],
            accuracy_spikes=mean.get("correct_spikes"),
            loss=mean["loss"],
            residual=mean["residual"],
            firing_rates=mean["firing_rates"],
            synops=sum(mean["synops"].values()) if "synops" in mean else None,
            num_steps=mean["steps"],
            num_examples=int(sums["count"]),
        )
        # The last batch is filled up with rows that are no examples.
        answers, confidence = (np.concatenate(part)[: len(split.labels)] for part in zip(*rows, strict=True))
        return Examination(evaluation, answers, confidence, mean.get("synops", {}))

    return examiner


def make_evaluator(network: Any, inputs: Inputs, **settings: Any) -> Callable[[dict[str, Any], Split], Evaluation]:
    """`evaluator(variables, split) -> Evaluation`: the means of `make_examiner`, which says what the arguments are."""
    examiner = make_examiner(network, inputs, **settings)
    return lambda variables, split: examiner(variables, split).evaluation


def as_json(score: Any) -> dict[str, Any]:
    """An evaluation as plain numbers; null for one that is not finite.

    Args:
        score: A NamedTuple of numbers and of dicts of numbers (`mpisjax.training.evaluation.Evaluation`).
    """
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
