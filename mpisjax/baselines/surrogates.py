"""The spiking neuron of the simulation, with a surrogate derivative."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError
from mpisjax.neurons import LIF, Neuron, potential_dtype

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
def _spike_jvp(threshold: float, surrogate: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    slope = SURROGATES[surrogate](u / threshold - 1) / threshold
    return spike(u, threshold, surrogate), slope.astype(du.dtype) * du


class Surrogate(NamedTuple):
    """The state of a `SurrogateLIF`.

    Attributes:
      potential: the membrane potential that the next step starts from.
      membrane: the membrane potential before its reset, in thresholds; for a readout.
    """

    potential: Array
    membrane: Array


@dataclasses.dataclass(frozen=True)
class SurrogateLIF:
    """A LIF neuron as backpropagation through time needs it: the same steps and values, differentiable.

    The reset is differentiated too, through the spike that causes it.

    Attributes:
      lif: the neuron.
      surrogate: a key of `SURROGATES`.
    """

    lif: LIF
    surrogate: str

    @property
    def leak(self) -> float:
        """The neuron's."""
        return self.lif.leak

    def initial_state(self, current: Any) -> Surrogate:
        """The neuron's initial potential."""
        dtype = potential_dtype(current)
        u = self.lif.initial_potential * jnp.asarray(self.lif.threshold, dtype)
        return Surrogate(jnp.broadcast_to(u, current.shape), jnp.zeros(current.shape, dtype))

    def step(self, state: Surrogate, current: Array) -> tuple[Surrogate, Array]:
        """One time step (Eq. 2 and 11)."""
        u = state.potential + current.astype(state.potential.dtype)
        threshold = self.lif.threshold
        fired = spike(u, threshold, self.surrogate)
        after = self.lif.leak * (u - threshold * fired)
        return Surrogate(after, u / threshold), fired.astype(current.dtype)

    def rate(self, current: Array) -> Array:
        """The neuron's."""
        return self.lif.rate(current)


def with_surrogate(surrogate: str) -> Callable[[Neuron], Neuron]:
    """Makes a neuron differentiable through time.

    Raises:
      UserError: it is no LIF neuron, or its threshold is trained.
    """

    def of(neuron: Neuron) -> Neuron:
        if not isinstance(neuron, LIF) or not isinstance(neuron.threshold, (int, float)):
            raise UserError(
                f"backpropagation through time has no surrogate derivative for {neuron!r}: use LIF or IF neurons with "
                "a number for a threshold."
            )
        return SurrogateLIF(neuron, surrogate)

    return of
