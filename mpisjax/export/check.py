"""Runs a network on its way out: its accuracy after each step, and spike for spike beside the independent simulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import folded, nir_host
from mpisjax.export.folded import Form, Network
from mpisjax.simulate import accumulate, firing_rate, over_time

BATCH = 32  # images side by side


class Exported(NamedTuple):
    """A network on its way out.

    Attributes:
        form: Which parts are neurons.
        network: Linear maps and thresholds; integers or floats.
        pixels: How the host makes the input of pixels: `mean` and `std`, or `offset`; `scale` for integer currents.
    """

    form: Form
    network: Network
    pixels: dict[str, Any]

    def read(self, images: Any) -> Any:
        """uint8 images [batch, ...] as the network reads them; frames lead."""
        images = np.swapaxes(images, 0, 1) if self.form.net.temporal else images
        if "offset" in self.pixels:
            return images.astype(np.float64) - self.pixels["offset"]
        dtype = self.pixels["mean"].dtype
        return (images.astype(dtype) / dtype.type(255) - self.pixels["mean"]) / self.pixels["std"]

    def encode(self, x: Any) -> jax.Array:
        """The transition's input from what `read` gave: whole numbers where the network has them."""
        given = folded.encode(self.form, self.network, jnp.asarray(x))
        return jnp.rint(given / self.pixels["scale"]) if "scale" in self.pixels else given


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        spikes: By population, summed over images, neurons and steps.
        classes: What both answer, int [images].
    """

    spikes: dict[str, int]
    classes: np.ndarray


def spike_for_spike(exported: Exported, graph: Any, images: np.ndarray, num_steps: int) -> Checked:
    """Runs both and compares every neuron in every step, in double precision.

    Args:
        exported: The network, in the numbers that the graph was written from.
        graph: As read back from its file.
        images: uint8 [batch, ...].
        num_steps: Time steps.

    Raises:
        UserError: A spike or a class differs.
    """
    with jax.enable_x64(True):
        starts = range(0, len(images), BATCH)
        parts = [_one_batch(exported, graph, images[start : start + BATCH], num_steps) for start in starts]
    spikes = {name: sum(p.spikes[name] for p in parts) for name in parts[0].spikes}
    return Checked(spikes, np.concatenate([p.classes for p in parts]))


def _one_batch(exported: Exported, graph: Any, images: np.ndarray, num_steps: int) -> Checked:
    form, network = exported.form, exported.network
    given = exported.encode(exported.read(images))
    activity = activity_by_step(form, network, given, None if form.net.temporal else num_steps)
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
    if differ := int(np.sum(found.scores.argmax(-1) != classes)):
        raise UserError(f"the check failed: {differ} of {len(images)} classes differ.")
    return Checked({name: int(s.sum()) for name, s in found.spikes.items()}, classes)


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
            folded.transition(form), network, x, form.initial_rates(batch), neuron=form.neuron,
            num_steps=num_steps, time_axis=0 if form.net.temporal else None, start=lambda shapes: None,
            observer=lambda seen, step: (seen, {k: p.activity for k, p in step.populations.items()}),
        )[1]  # fmt: skip

    return {name: np.asarray(spikes) for name, spikes in jax.jit(run)(network, x).items()}


def by_steps(exported: Exported, images: np.ndarray, labels: np.ndarray, num_steps: int) -> np.ndarray:
    """The accuracy after 1, 2, ..., `num_steps` steps of one simulation, [num_steps].

    Integers are simulated in float64, which holds every sum exactly.

    Args:
        exported: What `mpisjax.export.job.prepare` gave, for input that is constant in time.
        images: uint8 [count, height, width, channels].
        labels: Their classes.
        num_steps: Time steps.
    """
    form, leak = exported.form, exported.form.neuron.leak
    with jax.enable_x64(exported.network.layers.trans[0].kernel.dtype != np.float32):

        @jax.jit
        def answers(network: Network, x: Any) -> Any:
            def observe(seen: Any, step: Any) -> Any:
                total, weight = accumulate(seen[0], step.feedback, leak), leak * seen[1] + 1
                return (total, weight), folded.classify(form, network, firing_rate(total, weight)).argmax(-1)

            zeros = form.initial_rates(len(x))
            return over_time(
                folded.transition(form), network, exported.encode(x), zeros, neuron=form.neuron, num_steps=num_steps,
                observer=observe, start=lambda shapes: (zeros, jnp.zeros(())),
            )[1]  # fmt: skip

        network = jax.tree.map(lambda a: jnp.asarray(a, float), exported.network)
        starts = range(0, len(images), BATCH)
        found = [np.asarray(answers(network, exported.read(images[i : i + BATCH]))) for i in starts]
        return (np.concatenate(found, 1) == labels).mean(1)
