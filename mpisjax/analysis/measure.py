"""One pass over examples: accuracy, confusion, firing rates from true spike counts, SynOps and energy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import confusion_matrix

from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Split, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import Cost, additions_per_step, cost, synapses
from mpisjax.simulate import SpikeForward
from mpisjax.training.evaluation import make_examiner


class Measurement(NamedTuple):
    """What a simulation of T steps gave.

    Attributes:
      num_steps: T.
      num_examples: examples.
      accuracy: as the network was trained to answer: by the equivalent path, f of the spikes' rates; by BPTT's own
        readout where it was trained through time.
      accuracy_spikes: by the spikes' own rates.
      confusion: int [classes, classes]: row true class, column answer (of `accuracy`).
      firing_rates: spikes a neuron and step by population: true spike counts over all steps, unweighted.
      residual: mean relative residual of the rates by stream.
      cost: of a sample; None of a network of one's own, whose synapses are not known.
      answers: int [n], the class that each example was taken for.
      confidence: float [n], the probability of that class.
    """

    num_steps: int
    num_examples: int
    accuracy: float
    accuracy_spikes: float
    confusion: np.ndarray
    firing_rates: dict[str, float]
    residual: dict[str, float]
    cost: Cost | None
    answers: np.ndarray
    confidence: np.ndarray


def first_examples(split: Split, limit: int | None) -> Split:
    """The split, or its first `limit` examples."""
    if limit is None or limit >= len(split.labels):
        return split
    return Split(np.asarray(split.images[np.arange(limit)]), split.labels[:limit])


def measure(
    net: Any,
    variables: dict[str, Any],
    dataset: Any,
    split: Split,
    *,
    neuron: LIF,
    num_steps: int | None,
    through_time: BPTT | None = None,
    batch_size: int = 256,
) -> Measurement:
    """Simulates every example for a fixed number of steps and counts.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        dataset: Normalisation and kind of input.
        split: Examples and labels.
        neuron: The network's neurons.
        num_steps: T. Input over time has as many steps as frames.
        through_time: How a network that was trained through time answers; None for the equivalent path.
        batch_size: Examples at once.
    """
    # Every step is run: the operations of settled samples would be unknown otherwise.
    forward = SpikeForward(None if dataset.temporal else num_steps)
    examiner = make_examiner(net, dataset, neuron=neuron, forward=forward, bptt=through_time, batch_size=batch_size)
    found = examiner(variables, split)
    score = found.evaluation
    return Measurement(
        num_steps=round(score.num_steps),
        num_examples=score.num_examples,
        accuracy=score.accuracy,
        accuracy_spikes=score.accuracy_spikes or 0.0,
        confusion=confusion_matrix(split.labels, found.answers, labels=np.arange(dataset.num_classes)),
        firing_rates=score.firing_rates,
        residual=score.residual,
        cost=_cost(net, variables, dataset, split, found.synops, neuron, forward),
        answers=found.answers,
        confidence=found.confidence,
    )


def _cost(
    net: Any, variables: dict[str, Any], dataset: Any, split: Split, operations: Any, neuron: LIF, forward: SpikeForward
) -> Cost | None:
    """Operations and energy of a sample, of which `operations` are the synaptic ones by layer."""
    if not isinstance(net, MPIS):
        return None
    height, width, channels = split.images.shape[-3:]
    images = prepare_images(jnp.zeros((1, *split.images.shape[1:]), jnp.uint8), dataset)
    simulation = jax.eval_shape(lambda v, x: model.spikes(net, v, x, neuron=neuron, forward=forward), variables, images)
    populations = {name: count.shape[1:] for name, count in simulation.spike_counts.items()}
    return cost(
        synapses(net, (height, width, channels)),
        operations,
        num_steps=forward.num_steps or len(images),
        neurons=sum(int(np.prod(s)) for s in populations.values()),
        additions=additions_per_step(net, populations),
        leak=neuron.leak,
    )


def against_steps(
    net: Any, variables: dict[str, Any], dataset: Any, split: Split, steps: Iterable[int], **settings: Any
) -> list[Measurement]:
    """`measure` for several T: accuracy against latency and SynOps. Arguments as there."""
    return [measure(net, variables, dataset, split, num_steps=t, **settings) for t in steps]
