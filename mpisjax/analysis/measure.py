"""One pass over examples: accuracy, answers, firing rates from true spike counts, SynOps and energy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Split, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import Cost, additions_per_step, cost, synapses
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
        What was found, and the cost of a sample: None of a network of one's own, whose synapses are not known.
    """
    # Every step is run: the operations of settled samples would be unknown otherwise.
    forward = SpikeForward(None if dataset.temporal else num_steps)
    examiner = make_examiner(net, dataset, neuron=neuron, forward=forward, bptt=through_time, batch_size=batch_size)
    found = examiner(variables, split)
    if not isinstance(net, MPIS):
        return found, None
    height, width, channels = split.images.shape[-3:]
    images = prepare_images(jnp.zeros((1, *split.images.shape[1:]), jnp.uint8), dataset)
    simulation = jax.eval_shape(lambda v, x: model.spikes(net, v, x, neuron=neuron, forward=forward), variables, images)
    populations = {name: count.shape[1:] for name, count in simulation.spike_counts.items()}
    return found, cost(
        synapses(net, (height, width, channels)),
        found.synops,
        num_steps=forward.num_steps or len(images),
        neurons=sum(int(np.prod(s)) for s in populations.values()),
        additions=additions_per_step(net, populations),
        leak=neuron.leak,
    )
