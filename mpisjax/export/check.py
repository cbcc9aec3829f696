"""Compares an exported graph, run by the independent simulator, with mpisjax's own simulation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import folded, nir_host
from mpisjax.export.folded import Form, Network
from mpisjax.simulate import over_time

BATCH = 32


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        images: How many were run.
        spikes: By population, summed over images, neurons and steps.
        classes: What the graph answers, int [images].
        same: How many of them are mpisjax's own answers.
    """

    images: int
    spikes: dict[str, int]
    classes: np.ndarray
    same: int


def spike_for_spike(
    form: Form, network: Network, graph: Any, images: np.ndarray, x: np.ndarray, num_steps: int
) -> Checked:
    """Runs both and compares every neuron in every step.

    Args:
        form: Which parts are neurons.
        network: As folded, in the numbers that the graph was written from.
        graph: As read back from its file.
        images: uint8 [batch, ...], for the independent simulator.
        x: The same images as the network reads them, for mpisjax; frames lead.
        num_steps: Time steps.

    Raises:
        UserError: A spike differs.
    """
    axis = 1 if form.net.temporal else 0
    parts = []
    for start in range(0, len(images), BATCH):
        batch = slice(start, start + BATCH)
        ours = x[:, batch] if axis else x[batch]
        with jax.enable_x64(True):
            parts.append(_one_batch(form, network, graph, images[batch], jnp.asarray(ours), num_steps))
    spikes = {name: sum(p.spikes[name] for p in parts) for name in parts[0].spikes}
    classes = np.concatenate([p.classes for p in parts])
    return Checked(len(images), spikes, classes, sum(p.same for p in parts))


def _one_batch(form: Form, network: Network, graph: Any, images: np.ndarray, x: Any, num_steps: int) -> Checked:
    temporal = form.net.temporal
    given = folded.encode(form, network, x)
    if "scale" in graph.metadata["input"]:
        given = jnp.rint(given / jnp.asarray(graph.metadata["input"]["scale"]))
    activity = activity_by_step(form, network, given, None if temporal else num_steps)
    steps = len(next(iter(activity.values())))
    about = graph.metadata["populations"]

    def watch(step: int, values: dict[str, np.ndarray]) -> None:
        for name, ours in activity.items():
            node = name.replace("/", "_")
            theirs = nir_host.image_of(values[f"{node}_spikes"], about[node])
            if differ := int(np.sum(theirs != ours[step])):
                raise UserError(
                    f"the check failed: {differ} of {ours[step].size} spikes of {name} differ at step {step + 1} "
                    "between mpisjax and the exported graph."
                )

    found = nir_host.run(graph, images, steps, watch)
    leak = form.neuron.leak
    weights = leak ** np.arange(steps - 1, -1, -1.0)
    last = len(form.net.layers)
    names = {f"stream{i}": f"stream{i}/layer{last}" for i in range(1, form.net.num_streams + 1)}
    names |= {"head": "head"} if form.head_spikes else {}
    rates = {key: jnp.asarray(np.tensordot(weights / weights.sum(), activity[name], 1)) for key, name in names.items()}
    classes = np.asarray(jnp.argmax(folded.classify(form, network, rates), -1))
    theirs = found.scores.argmax(-1)
    spikes = {name: int(s.sum()) for name, s in found.spikes.items()}
    return Checked(len(images), spikes, theirs, int(np.sum(theirs == classes)))


def activity_by_step(form: Form, network: Network, x: Any, num_steps: int | None) -> dict[str, np.ndarray]:
    """Every population's spikes, [steps, batch, height, width, channels].

    Args:
        form: Which parts are neurons.
        network: Linear maps and thresholds.
        x: What `folded.encode` gave.
        num_steps: Time steps; None for frames, which have their own number.
    """
    batch = x.shape[1 if form.net.temporal else 0]
    network = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), network)

    def run(network: Network, x: Any) -> Any:
        return over_time(
            folded.transition(form), network, x, form.initial_rates(batch, x.dtype), neuron=form.neuron,
            num_steps=num_steps, time_axis=0 if form.net.temporal else None, start=lambda shapes: None,
            observer=lambda seen, step: (seen, {k: p.activity for k, p in step.populations.items()}),
        )[1]  # fmt: skip

    return {name: np.asarray(spikes) for name, spikes in jax.jit(run)(network, x).items()}
