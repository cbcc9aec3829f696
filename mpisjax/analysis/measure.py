"""One pass over examples: accuracy, confusion, firing rates from true spike counts, SynOps and energy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import confusion_matrix

from mpisjax.baselines import bptt
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Batch, Split, eval_batches, prepare_images
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import Cost, additions_per_step, cost, synapses, synops
from mpisjax.simulate import SpikeForward

Array = jax.Array


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
      cost: of a sample.
    """

    num_steps: int
    num_examples: int
    accuracy: float
    accuracy_spikes: float
    confusion: np.ndarray
    firing_rates: dict[str, float]
    residual: dict[str, float]
    cost: Cost


def first_examples(split: Split, limit: int | None) -> Split:
    """The split, or its first `limit` examples."""
    if limit is None or limit >= len(split.labels):
        return split
    return Split(np.asarray(split.images[np.arange(limit)]), split.labels[:limit])


def measure(
    net: MPIS,
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
    shape = split.images.shape
    links = synapses(net, (shape[-3], shape[-2], shape[-1]))
    steps = shape[1] * dataset.steps_per_frame if dataset.temporal else int(forward.num_steps or 0)
    populations: dict[str, tuple[int, ...]] = {}

    @jax.jit
    def count(variables: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], Array]:
        """Sums over the batch's real rows, and the answer to every row."""
        x = prepare_images(batch.images, dataset)
        mask = batch.mask
        simulation = model.spikes(net, variables, x, neuron=neuron, forward=forward)
        rates, _, residual = model.equivalent_step(net, variables, x, simulation.rates, neuron)
        by_spikes: Any = net.apply(variables, simulation.rates, False, method="classify")
        if through_time is None:
            logits: Any = net.apply(variables, rates, False, method="classify")
        elif through_time.readout == "rate":
            logits = by_spikes
        else:
            logits = bptt.apply(
                net, variables, x, neuron=neuron, num_steps=forward.num_steps, bptt=through_time
            ).logits
        populations.update({k: v.shape[1:] for k, v in simulation.spike_counts.items()})
        spiked = {k: jnp.mean(v, axis=(1, 2, 3)) / steps for k, v in simulation.spike_counts.items()}
        by_sample = {
            "spikes": jnp.argmax(by_spikes, -1) == batch.labels,
            "residual": residual,
            "rates": spiked,
            "synops": synops(links, simulation.spike_counts),
        }
        sums = jax.tree.map(lambda v: jnp.sum(v * mask), by_sample)
        return {**sums, "count": jnp.sum(mask)}, jnp.argmax(logits, -1)

    total: Any = None
    answers = []
    for batch in eval_batches(split, batch_size):
        sums, answered = count(variables, batch)
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        total = part if total is None else jax.tree.map(np.add, total, part)
        answers.append(np.asarray(answered))
    # The last batch is filled up with rows that are no examples.
    given = np.concatenate(answers)[: len(split.labels)]
    confusion = confusion_matrix(split.labels, given, labels=np.arange(net.num_classes))
    number = float(total["count"])
    mean = {
        k: jax.tree.map(lambda v: float(v) / number, total[k])
        for k in ("spikes", "residual", "rates", "synops")
    }
    return Measurement(
        num_steps=steps,
        num_examples=int(number),
        accuracy=float(np.trace(confusion)) / number,
        accuracy_spikes=mean["spikes"],
        confusion=confusion,
        firing_rates=mean["rates"],
        residual=mean["residual"],
        cost=cost(
            links,
            mean["synops"],
            num_steps=steps,
            neurons=sum(int(np.prod(s)) for s in populations.values()),
            additions=additions_per_step(net, populations),
            leak=neuron.leak,
        ),
    )


def against_steps(
    net: MPIS, variables: dict[str, Any], dataset: Any, split: Split, steps: Iterable[int], **settings: Any
) -> list[Measurement]:
    """`measure` for several T: accuracy against latency and SynOps. Arguments as there."""
    return [measure(net, variables, dataset, split, num_steps=t, **settings) for t in steps]
