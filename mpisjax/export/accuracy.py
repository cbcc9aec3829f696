"""How often an exported network is right after each time step, by its spikes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.export import folded
from mpisjax.export.job import Exported
from mpisjax.simulate import over_time


def by_steps(
    exported: Exported, images: np.ndarray, labels: np.ndarray, num_steps: int, batch_size: int = 100
) -> np.ndarray:
    """The accuracy after 1, 2, ..., `num_steps` steps of one simulation, [num_steps].

    Integers are simulated in float64, which holds them exactly.

    Args:
        exported: What `mpisjax.export.job.prepare` gave, for input that is constant in time.
        images: uint8 [count, height, width, channels].
        labels: Their classes.
        num_steps: Time steps.
        batch_size: Images side by side.
    """
    form, leak = exported.form, exported.form.neuron.leak
    wide = exported.network.layers.trans[0].kernel.dtype != np.float32
    right = np.zeros(num_steps)
    with jax.enable_x64(bool(wide)):
        dtype = jnp.float64 if wide else jnp.float32
        network = jax.tree.map(lambda a: jnp.asarray(a, dtype), exported.network)

        @jax.jit
        def answers(network: Any, x: Any) -> Any:
            given = folded.encode(form, network, x)
            if "scale" in exported.pixels:
                given = jnp.rint(given / exported.pixels["scale"])

            def observe(seen: Any, step: Any) -> Any:
                total, weight = seen
                total = jax.tree.map(lambda t, s: leak * t + s, total, step.feedback)
                weight = leak * weight + 1
                rates = jax.tree.map(lambda t: t / weight, total)
                return (total, weight), folded.classify(form, network, rates).argmax(-1)

            zeros = form.initial_rates(len(x), dtype)
            return over_time(
                folded.transition(form), network, given, zeros, neuron=form.neuron, num_steps=num_steps,
                observer=observe, start=lambda shapes: (zeros, jnp.zeros((), dtype)),
            )[1]  # fmt: skip

        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            found = answers(network, jnp.asarray(exported.read(images[batch]), dtype))
            right += np.asarray(found == labels[batch]).sum(1)
    return right / len(images)
