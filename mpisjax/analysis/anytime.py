"""Anytime answers: what the spikes say after each time step, and when to stop listening.

A network that spikes can be asked at any time: after each step the classifier looks at the firing rates of the steps so
far. Easy examples are clear early. So a simulation that stops at the first sure answer takes fewer steps and spikes
than one of fixed length, at the same accuracy. How sure is sure enough is chosen on held-out examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.analysis.measure import first_examples
from mpisjax.data import DataSet, Split, eval_batches, prepare_images
from mpisjax.neurons import Neuron
from mpisjax.nn import model
from mpisjax.nn.operations import count_operations
from mpisjax.simulate import Step, accumulate, firing_rate, over_time, wide_zeros

Array = jax.Array
LEAST_HELD_OUT, MOST_HELD_OUT = 100, 2000  # examples that the threshold of the early exit is chosen on


class Answers(NamedTuple):
    """What a simulation says after each time step; row t - 1 is of the first t steps.

    Attributes:
        logits: float [T, batch, classes]: the classifier on the rates so far.
        spikes: int32 [T, batch]: spikes so far, of all populations.
        synops: float32 [T, batch]: synaptic operations so far; 0 of a network whose synapses are not known
            (`mpisjax.nn.operations.count_operations`).
    """

    logits: Any
    spikes: Any
    synops: Any


class EarlyExit(NamedTuple):
    """Answers of a split that stop at the first one that is sure enough.

    Attributes:
        threshold: The least confidence at which an answer is given before the last step.
        accuracy: Share of right answers.
        mean_steps: Mean of the time steps used.
        synops: Mean of the synaptic operations used, of a sample.
        max_steps: The most steps that there are, T.
        full_accuracy: Share of right answers after all T steps.
        full_synops: Mean of the synaptic operations of all T steps.
    """

    threshold: float
    accuracy: float
    mean_steps: float
    synops: float
    max_steps: int
    full_accuracy: float
    full_synops: float


class Record(NamedTuple):
    """What `record` keeps of a split; row t - 1 is of the first t steps.

    Attributes:
        confidence: float32 [T, n], the largest probability.
        correct: bool [T, n].
        synops: float32 [T, n], so far.
    """

    confidence: Any
    correct: Any
    synops: Any


def answers_over_time(
    net: Any, variables: dict[str, Any], images: Array, *, neuron: Neuron, num_steps: int | None
) -> Answers:
    """Simulates a network and asks it after each time step, by spikes alone.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        neuron: Of the populations that bring none.
        num_steps: T; temporal input has as many steps as frames.
    """
    temporal = net.temporal
    counted = count_operations(net, variables, images, neuron)
    init = net.initial_rates(images)
    batch = jax.tree.leaves(init)[0].shape[0]
    leak = neuron.leak

    def start(shapes: dict[str, Any]) -> Any:
        weight = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(init)))
        return wide_zeros(init), weight, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)

    def observe(seen: Any, step: Step) -> tuple[Any, Answers]:
        total, weight, spikes, operations = seen
        total, weight = accumulate(total, step.feedback, leak), leak * weight + 1
        fired = {name: (population.activity != 0) for name, population in step.populations.items()}
        spikes += sum(jnp.sum(f, axis=tuple(range(1, f.ndim)), dtype=jnp.int32) for f in fired.values())
        operations += sum(counted.synops(fired).values()) if counted else 0.0
        rates = jax.tree.map(lambda r, like: r.astype(like.dtype), firing_rate(total, weight), init)
        logits = model.classify(net, variables, rates)
        return (total, weight, spikes, operations), Answers(logits, spikes, operations)

    return over_time(
        model.transition_of(net),
        variables,
        net.apply(variables, images, False, method="encode"),
        init,
        neuron=neuron,
        num_steps=None if temporal else num_steps,
        observer=observe,
        start=start,
        time_axis=0 if temporal else None,
    )[1]


def first_sure(confidence: Any, threshold: Any) -> np.ndarray:
    """The row of each example's first confidence of at least `threshold`; the last row where there is none.

    Args:
        confidence: float [T, n].
        threshold: A number.

    Returns:
        int [n], from 0 to T - 1.
    """
    sure = np.asarray(confidence) >= threshold
    sure[-1] = True
    return sure.argmax(0)


def record(
    net: Any,
    variables: dict[str, Any],
    inputs: Any,
    split: Split,
    *,
    neuron: Neuron,
    num_steps: int | None,
    batch_size: int = 256,
) -> Record:
    """Asks a network about every example of a split after each time step.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        inputs: Normalisation and kind of input.
        split: Examples and labels.
        neuron: Of the populations that bring none.
        num_steps: T; input over time has as many steps as frames.
        batch_size: Examples at once.
    """

    @jax.jit
    def ask(variables: dict[str, Any], images: Array, labels: Array) -> Record:
        x = prepare_images(images, inputs)
        found = answers_over_time(net, variables, x, neuron=neuron, num_steps=num_steps)
        confidence = jnp.max(jax.nn.softmax(found.logits), -1)
        return Record(confidence, jnp.argmax(found.logits, -1) == labels, found.synops)

    def parts() -> Iterator[Record]:
        for batch in eval_batches(split, batch_size):
            yield jax.device_get(ask(variables, batch.images, batch.labels))

    # The last batch is filled up with rows that are no examples.
    whole = zip(*parts(), strict=True)
    return Record(*(np.concatenate(part, axis=1)[:, : len(split.labels)] for part in whole))


def choose_threshold(found: Record) -> float:
    """The confidence that saves the most steps and keeps the accuracy of all steps, but for one answer of a thousand.

    Args:
        found: Of held-out examples.

    Returns:
        The threshold; above 1, so that nothing stops early, where no confidence will do.
    """
    wanted = found.correct[-1].mean() - 0.001
    # Evenly in the logarithm of the doubt, since most answers are very sure.
    for threshold in 1 - np.geomspace(0.8, 1e-4, 64):
        if early_exit(found, float(threshold)).accuracy >= wanted:
            return float(threshold)
    return 2.0


def held_out_count(dataset: DataSet) -> int:
    """How many held-out examples `on_held_out` looks at."""
    return min(len(dataset.validation.labels), MOST_HELD_OUT)


def on_held_out(net: Any, variables: dict[str, Any], dataset: DataSet, **of_network: Any) -> EarlyExit:
    """The threshold that the first held-out examples choose, and what it gives them; the rest is as for `record`."""
    found = record(net, variables, dataset, first_examples(dataset.validation, MOST_HELD_OUT), **of_network)
    return early_exit(found, choose_threshold(found))


def early_exit(found: Record, threshold: float) -> EarlyExit:
    """What it gives to stop each example at its first answer of at least this confidence."""
    at = first_sure(found.confidence, threshold)
    chosen = np.arange(len(at))
    return EarlyExit(
        threshold=threshold,
        accuracy=float(found.correct[at, chosen].mean()),
        mean_steps=float(at.mean() + 1),
        synops=float(found.synops[at, chosen].mean()),
        max_steps=len(found.confidence),
        full_accuracy=float(found.correct[-1].mean()),
        full_synops=float(found.synops[-1].mean()),
    )
