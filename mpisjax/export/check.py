"""Runs a network on its way out: its accuracy after each step, and spike for spike beside the independent simulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import folded, nir_host
from mpisjax.export.folded import SPLIT, Form, Network
from mpisjax.export.polyphase import Folded
from mpisjax.simulate import over_time

BATCH = 32
EXACT = 2**24  # float32 holds every integer up to here


class Exported(NamedTuple):
    """A network on its way out.

    Attributes:
        form: Which parts are neurons.
        network: Linear maps and thresholds; integers or floats.
        pixels: How the host makes the input of pixels: `mean` and `std`, or `offset`; `scale` for integer currents.
    """

    form: folded.Form
    network: folded.Network
    pixels: dict[str, Any]

    def read(self, images: Any) -> Any:
        """uint8 images [batch, ...] as the network reads them; frames lead."""
        images = np.swapaxes(images, 0, 1) if self.form.net.temporal else images
        if "offset" in self.pixels:
            return images.astype(np.float64) - self.pixels["offset"]
        dtype = self.pixels["mean"].dtype
        return (images.astype(dtype) / dtype.type(255) - self.pixels["mean"]) / self.pixels["std"]


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


def by_steps(
    exported: Exported, images: np.ndarray, labels: np.ndarray, num_steps: int, batch_size: int = 100
) -> np.ndarray:
    """The accuracy after 1, 2, ..., `num_steps` steps of one simulation, [num_steps].

    Args:
        exported: What `mpisjax.export.job.prepare` gave, for input that is constant in time.
        images: uint8 [count, height, width, channels].
        labels: Their classes.
        num_steps: Time steps.
        batch_size: Images side by side.
    """
    answers = classes_by_steps(exported, images, num_steps, batch_size)
    return (answers == labels).mean(1)


def classes_by_steps(exported: Exported, images: np.ndarray, num_steps: int, batch_size: int = 100) -> np.ndarray:
    """The classes after 1, 2, ..., `num_steps` steps, [num_steps, count]; arguments as of `by_steps`.

    Integers are simulated in floats that hold every sum exactly: in float64 where currents are fused, where float32
    is enough in float32. What the host computes is in float32.
    """
    form, leak = exported.form, exported.form.neuron.leak
    whole = exported.network.layers.trans[0].kernel.dtype.kind == "i"
    with jax.enable_x64(whole):
        narrow = jnp.float32 if not whole or _largest(exported, num_steps) < EXACT else jnp.float64
        network = in_floats(exported.network, narrow, jnp.float64 if whole else narrow)

        @jax.jit
        def answers(network: Any, x: Any) -> Any:
            given = folded.encode(form, exported.network, x)
            if "scale" in exported.pixels:
                given = jnp.rint(given / exported.pixels["scale"])
            given = given.astype(narrow)

            def observe(seen: Any, step: Any) -> Any:
                total, weight = seen
                total = jax.tree.map(lambda t, s: leak * t + s, total, step.feedback)
                weight = leak * weight + 1
                rates = jax.tree.map(lambda t: t / weight, total)
                return (total, weight), folded.classify(form, network, rates).argmax(-1)

            zeros = form.initial_rates(len(x), narrow)
            counted = jnp.float64 if whole and form.head_spikes else narrow
            sums = jax.tree.map(lambda a: a.astype(counted), zeros)
            return over_time(
                folded.transition(form), network, given, zeros, neuron=form.neuron, num_steps=num_steps,
                observer=observe, start=lambda shapes: (sums, jnp.zeros((), counted)),
            )[1]  # fmt: skip

        starts = range(0, len(images), batch_size)
        found = [answers(network, exported.read(images[i : i + batch_size]).astype(narrow)) for i in starts]
        return np.concatenate([np.asarray(part) for part in found], 1)


def in_floats(network: Network, narrow: Any, wide: Any) -> Network:
    """The network in floats: wide where currents are fused, but for the kernels there, and in the classifier."""
    parts = {name: jax.tree.map(lambda a: jnp.asarray(a, narrow), part)
             for name, part in network.layers._asdict().items() if name not in ("down", "classifier")}  # fmt: skip
    split = lambda a: a._replace(kernel=jnp.asarray(a.kernel, narrow), bias=jnp.asarray(a.bias, wide))  # noqa: E731
    down = jax.tree.map(split, network.layers.down, is_leaf=_is_layer)
    classifier = jax.tree.map(lambda a: jnp.asarray(a, wide), network.layers.classifier)
    layers = network.layers._replace(**parts, down=down, classifier=classifier)
    gains = jax.tree.map(lambda a: jnp.asarray(a, wide), network.gains)
    return Network(layers, network.thresholds, gains)


def _largest(exported: Exported, num_steps: int) -> float:
    """A bound on every number that `in_floats` makes narrow: potentials and currents, and the fusion's two parts."""
    layers, units = exported.network.layers, np.min(exported.pixels.get("scale", 1))

    def reach(layer: Folded, size: float = 1, out: int = 3) -> float:
        kernel = np.abs(np.asarray(layer.kernel, np.float64))
        axes = tuple(a for a in range(kernel.ndim) if a != out)
        return float(np.max(size * kernel.sum(axes) + np.abs(layer.bias)))

    each = lambda part: jax.tree.leaves(part, is_leaf=_is_layer)  # noqa: E731
    sizes = [255.0] + [1.0] * len(layers.stem)
    stem = [reach(layer, size) for layer, size in zip((*layers.stem, layers.inject), sizes, strict=True)]
    into = max(reach(layer, out=2) for layer in layers.trans) + stem[-1] / units
    current = max(into, *stem, sum(map(reach, each(layers.head))), *map(reach, each(layers.feb)))
    relayed = [reach(layer, max(SPLIT / 2, current / SPLIT)) for layer in each(layers.down)]
    return max([(num_steps + 1) * current, *relayed])


def _is_layer(part: Any) -> bool:
    return isinstance(part, Folded)
