"""Every spike of one example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.neurons import LIF, SpikeReading, population_shapes, resting_potentials
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS

Array = jax.Array


def raster(
    net: MPIS, variables: dict[str, Any], images: Array, neuron: LIF, num_steps: int | None
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
    transition = model.transition_of(net)
    x = net.apply(variables, images, False, method="encode")
    first: Any = x[0] if net.temporal else x
    init = net.initial_rates(images)
    shapes = population_shapes(transition, variables, init, first)

    def advance(carry: Any, x_t: Any) -> Any:
        fire = SpikeReading(neuron, carry[0])
        spikes = transition(variables, carry[1], x_t if net.temporal else x, fire)
        return (fire.potentials, spikes), {k: jnp.ravel(v) > 0 for k, v in fire.activity.items()}

    carry = (resting_potentials(neuron, shapes), init)
    frames, length = (x, None) if net.temporal else (None, num_steps)
    spikes = jax.jit(lambda carry, frames: jax.lax.scan(advance, carry, frames, length=length)[1])(
        carry, frames
    )
    return {k: np.asarray(spikes[k]) for k in shapes}
