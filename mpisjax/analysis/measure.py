"""One pass over examples: accuracy, answers, firing rates from true spike counts, SynOps and energy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Split, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn.operations import Cost, count_operations
from mpisjax.simulate import SpikeForward
from mpisjax.training.evaluation import Examination, make_examiner


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
) -> tuple[Examination, Cost | None]:
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

    Returns:
        What was found, and the cost of a sample: None of a network whose synapses are not known
        (`mpisjax.nn.operations.count_operations`).
    """
    # Every step is run: the operations of settled samples would be unknown otherwise.
    forward = SpikeForward(None if dataset.temporal else num_steps)
    examiner = make_examiner(net, dataset, neuron=neuron, forward=forward, bptt=through_time, batch_size=batch_size)
    found = examiner(variables, split)
    one = prepare_images(jnp.zeros((1, *split.images.shape[1:]), jnp.uint8), dataset)
    operations = count_operations(net, variables, one, neuron)
    if operations is None:
        return found, None
    return found, operations.cost(found.synops, found.evaluation.num_steps, neuron.leak)
