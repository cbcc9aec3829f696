"""A third reading of `fire`: the spiking neuron of the simulation, with a surrogate derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError
from mpisjax.neurons import LIF, SpikeReading

Array = jax.Array

# ds/dv at v = membrane potential / threshold - 1. Each peaks at 1 for v = 0 and has area 1, so that they
# differ in shape alone: how far from the threshold a neuron still learns.
SURROGATES: dict[str, Callable[[Array], Array]] = {
    "rectangular": lambda v: (jnp.abs(v) <= 0.5).astype(v.dtype),
    "triangular": lambda v: jnp.maximum(0, 1 - jnp.abs(v)),
    "arctan": lambda v: 1 / (1 + jnp.square(jnp.pi * v)),
    "sigmoid": lambda v: 4 * jax.nn.sigmoid(4 * v) * jax.nn.sigmoid(-4 * v),
}


def check_surrogate(name: str) -> None:
    """Refuses a surrogate that there is not.

    Raises:
      UserError: in one sentence.
    """
    if name not in SURROGATES:
        raise UserError(f"bptt.surrogate is {name!r}: choose one of {', '.join(SURROGATES)}.")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def spike(u: Array, threshold: float, surrogate: str) -> Array:
    """1 where the membrane potential `u` has reached the threshold, else 0, with a surrogate derivative.

    Args:
      u: membrane potentials.
      threshold: in the unit of `u`.
      surrogate: a key of `SURROGATES` (Neftci, Mostafa & Zenke, 2019, "Surrogate gradient learning in spiking
        neural networks", reviews them); "sigmoid" is the derivative of a sigmoid of slope 4.
    """
    return (u >= threshold).astype(u.dtype)


@spike.defjvp
def _spike_jvp(
    threshold: float, surrogate: str, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    slope = SURROGATES[surrogate](u / threshold - 1) / threshold
    return spike(u, threshold, surrogate), slope.astype(du.dtype) * du


class SurrogateReading(SpikeReading):
    """`fire` as backpropagation through time reads it: `SpikeReading`'s update and values, differentiable.

    The reset is differentiated too, through the spike that causes it.

    Args:
      neuron: the neuron's constants.
      potentials: membrane potentials by name, as the last step left them.
      surrogate: a key of `SURROGATES`.

    Attributes:
      membranes: after the transition ran, by name, each membrane potential before its reset, in thresholds.
    """

    def __init__(self, neuron: LIF, potentials: dict[str, Array], surrogate: str) -> None:
        super().__init__(neuron, potentials)
        self.surrogate, self.membranes = surrogate, dict[str, Array]()

    def __call__(self, name: str, current: Array) -> Array:
        u = self.before[name] + current
        fired = spike(u, self.neuron.threshold, self.surrogate)
        self.membranes[name] = u / self.neuron.threshold
        self.potentials[name] = self.neuron.leak * (u - self.neuron.threshold * fired)
        return self.record(name, fired.astype(current.dtype))
