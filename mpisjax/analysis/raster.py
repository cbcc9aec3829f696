"""Every spike of one example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax import firing
from mpisjax.neurons import Neuron
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.simulate import Step, over_time

Array = jax.Array


def raster(
    net: MPIS, variables: dict[str, Any], images: Array, neuron: Neuron, num_steps: int | None
) -> dict[str, np.ndarray]:
    """Simulates one example and keeps all its spikes.

    Args:
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      images: network input of a batch of one: [1, h, w, c], temporal [time, 1, h, w, c].
      neuron: neuron constants.
      num_steps: time steps; temporal input has as many as frames.

    Returns:
      bool [time, neurons] by population, in the order in which they fire within a step.
    """
    x = net.apply(variables, images, False, method="encode")

    def observe(seen: None, step: Step) -> tuple[None, dict[str, Array]]:
        return None, {k: jnp.ravel(fired.activity) > 0 for k, fired in step.populations.items()}

    @jax.jit
    def run(variables: dict[str, Any], x: Array) -> dict[str, Array]:
        return over_time(
            model.transition_of(net),
            variables,
            x,
            net.initial_rates(images),
            neuron=neuron,
            num_steps=None if net.temporal else num_steps,
            observer=observe,
            start=lambda shapes: None,
            time_axis=0 if net.temporal else None,
        )[1]

    # A dict comes out of jit sorted by its keys.
    spikes = run(variables, x)
    order = firing.trace(
        model.transition_of(net), variables, net.initial_rates(images), x[0] if net.temporal else x
    ).populations
    return {k: np.asarray(spikes[k]) for k in order}
