"""Spiking neurons and the two readings of `fire`: membrane potentials (spikes) and DBReLU (rates)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpisjax.errors import UserError

Array = jax.Array
Fire = Callable[[str, Array], Array]
"""`fire(name, current) -> activity`: one neuron population, named uniquely within a transition."""


@dataclasses.dataclass(frozen=True)
class LIF:
    """Leaky integrate-and-fire neurons with reset by subtraction (Eq. 2 and 11).

    One step is `u <- u + current; s = (u >= threshold); u <- leak * (u - threshold * s)`.

    Attributes:
      threshold: firing threshold, in the unit of the currents; > 0.
      leak: factor the membrane potential keeps from one step to the next, in (0, 1]; 1 is IF.
      initial_potential: membrane potential before the first step, in units of `threshold`, in [0, 1).
        Half a threshold turns the truncation of a T-step count into rounding, which halves the largest
        error of the rate at small T and leaves the limit T -> infinity as it is.

    Raises:
      UserError: a value is outside its range.
    """

    threshold: float = 1.0
    leak: float = 1.0
    initial_potential: float = 0.0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"neuron.threshold is {self.threshold}: set it to a number above 0.")
        if not 0 < self.leak <= 1:
            raise UserError(f"neuron.leak is {self.leak}: set it in (0, 1]; 1 means no leak (IF).")
        if not 0 <= self.initial_potential < 1:
            raise UserError(
                f"neuron.initial_potential is {self.initial_potential}: set it in [0, 1), as a fraction of "
                "the threshold."
            )

    def reset(self, u: Array) -> Array:
        """The membrane potential that the next step starts from: `u` after its spike, if any, and the leak."""
        threshold = jnp.asarray(self.threshold, u.dtype)
        u = u - jnp.where(u >= threshold, threshold, jnp.zeros((), u.dtype))
        return u if self.leak == 1 else u * self.leak


def IF(threshold: float = 1.0, initial_potential: float = 0.0) -> LIF:  # noqa: N802 (the field's name)
    """Integrate-and-fire neurons: `LIF` with `leak = 1`."""
    return LIF(threshold=threshold, leak=1.0, initial_potential=initial_potential)


@jax.custom_jvp
def dbrelu(u: Array) -> Array:
    """Double-bounded ReLU, `clip(u, 0, 1)`: the rate of a neuron driven by `u` thresholds a step (Eq. 10).

    Its derivative is 1 on the closed interval [0, 1] and 0 outside, so that a neuron resting exactly at a
    bound can still be moved off it.
    """
    return jnp.clip(u, 0, 1)


@dbrelu.defjvp
def _dbrelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    return dbrelu(u), jnp.where((u >= 0) & (u <= 1), du, jnp.zeros_like(du))


class _Population:
    """Bookkeeping shared by the readings: what fired under which name, each name once."""

    def __init__(self) -> None:
        self.activity: dict[str, Array] = {}

    def record(self, name: str, activity: Array) -> Array:
        if name in self.activity:
            raise UserError(
                f"fire() was called twice with the name {name!r}: give every neuron population of the "
                "transition a name of its own."
            )
        self.activity[name] = activity
        return activity


class RateReading(_Population):
    """`fire` as the equivalent map f reads it: DBReLU of the current over the threshold.

    Attributes:
      activity: after the transition ran, the firing rate of every population by name.
    """

    def __init__(self, neuron: LIF) -> None:
        super().__init__()
        self.neuron = neuron

    def __call__(self, name: str, current: Array) -> Array:
        scaled = current if self.neuron.threshold == 1 else current / self.neuron.threshold
        return self.record(name, dbrelu(scaled))


class SpikeReading(_Population):
    """`fire` as the simulation reads it: one time step of LIF neurons.

    Args:
      neuron: the neuron's constants.
      potentials: membrane potentials by name, as the last step left them.

    Attributes:
      activity: after the transition ran, this step's spikes (0 or 1) by name.
      integrated: the membrane potentials before spike and reset.
      potentials: the membrane potentials that the next step starts from.
    """

    def __init__(self, neuron: LIF, potentials: dict[str, Array]) -> None:
        super().__init__()
        self.neuron, self.before = neuron, potentials
        self.integrated, self.potentials = dict[str, Array](), dict[str, Array]()

    def __call__(self, name: str, current: Array) -> Array:
        u = self.integrated[name] = self.before[name] + current
        self.potentials[name] = self.neuron.reset(u)
        return self.record(name, (u >= self.neuron.threshold).astype(current.dtype))


def population_shapes(transition: Callable[..., Any], *args: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every population's current, from one abstract pass of `transition(*args, fire)`."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    reading = _Population()

    def fire(name: str, current: Array) -> Array:
        shapes[name] = jax.ShapeDtypeStruct(current.shape, current.dtype)
        return reading.record(name, current)

    jax.eval_shape(lambda *a: transition(*a, fire), *args)
    return shapes


def resting_potentials(neuron: LIF, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Membrane potentials before the first step; float32 at least, whatever the currents' precision."""
    u0 = neuron.initial_potential * neuron.threshold
    return {k: jnp.full(s.shape, u0, jnp.promote_types(s.dtype, jnp.float32)) for k, s in shapes.items()}
