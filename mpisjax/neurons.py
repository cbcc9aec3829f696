"""Spiking neurons: the protocol, and IF, LIF, ternary and graded neurons (Eq. 2, 10 and 11).

A neuron is a few pure functions: the state it starts from, one spiking step, and the rate at which it settles under a
constant current. The network's two readings use the last two, so they share one fixed point.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from mpisjax.errors import UserError

Population = Float[Array, "*population"]
Shape = Array | jax.ShapeDtypeStruct


@runtime_checkable
class Neuron(Protocol):
    """What a population of neurons has to offer. To add a neuron, write a class with these three methods.

    The class is a pytree, or is hashable and holds no arrays: make it a frozen dataclass, and register it with
    `jax.tree_util.register_dataclass` if it has parameters that are trained. The rate must be the limit of the mean
    activity under a constant current; otherwise the two readings have two fixed points. All functions act on each
    neuron alone.

    Attributes:
      leak: weight of a step against the next one in the firing rate (Eq. 3); 1 for neurons without a leak.
    """

    @property
    def leak(self) -> float:
        """See above."""

    def initial_state(self, current: Shape) -> PyTree:
        """The state before the first step: a pytree of arrays of the current's shape.

        Args:
          current: an array or `jax.ShapeDtypeStruct` of the population's shape and dtype; its values are not used.
        """

    def step(self, state: PyTree, current: Population) -> tuple[PyTree, Population]:
        """One time step.

        Args:
          state: as the step before left it.
          current: float, the population's shape.

        Returns:
          `(state, activity)`; the activity has the current's shape and dtype.
        """

    def rate(self, current: Population) -> Population:
        """The mean activity that a constant current leads to; the current's shape and dtype. Differentiable."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def bounded(u: Population, lower: float, upper: float) -> Population:
    """`clip(u, lower, upper)` with a derivative of 1 on the closed interval and 0 outside.

    A neuron that rests exactly at a bound can so be moved off it.
    """
    return jnp.clip(u, lower, upper)


@bounded.defjvp
def _bounded_jvp(lower: float, upper: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    return bounded(u, lower, upper), jnp.where((u >= lower) & (u <= upper), du, jnp.zeros_like(du))


def dbrelu(u: Population) -> Population:
    """Double-bounded ReLU, `clip(u, 0, 1)`: the rate of a neuron driven by `u` thresholds a step (Eq. 10)."""
    return bounded(u, 0.0, 1.0)


def potential_dtype(current: Shape) -> jnp.dtype:
    """Membrane potentials have the current's dtype, and float32 at least: sums over time keep their digits."""
    return jnp.promote_types(current.dtype, jnp.float32)


def _like(threshold: ArrayLike, x: Shape) -> Array:
    """The threshold in x's dtype, and in its shape unless it is one number."""
    threshold = (
        jnp.asarray(threshold).astype(x.dtype) if hasattr(threshold, "dtype") else jnp.asarray(threshold, x.dtype)
    )
    return jnp.broadcast_to(threshold, x.shape) if threshold.ndim else threshold


def _in_thresholds(current: Population, threshold: ArrayLike) -> Population:
    if isinstance(threshold, (int, float)) and threshold == 1:
        return current
    return current / _like(threshold, current)


def _check_threshold(threshold: ArrayLike) -> None:
    """Refuses a threshold whose value is known and impossible. Traced ones are not looked into."""
    if isinstance(threshold, (int, float, np.ndarray, np.number)) and not np.all(np.asarray(threshold) > 0):
        raise UserError(f"neuron.threshold is {threshold}: set it to a number above 0.")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["threshold"],
    meta_fields=["leak", "initial_potential"],
)
@dataclasses.dataclass(frozen=True)
class LIF:
    """Leaky integrate-and-fire neurons with reset by subtraction (Eq. 2 and 11).

    One step is `u <- u + current; s = (u >= threshold); u <- leak * (u - threshold * s)`. The rate in equilibrium is
    `dbrelu(current / threshold)` (Eq. 10).

    The state is the membrane potential before spike and reset: a CPU then writes it in one pass, in place.

    Attributes:
      threshold: firing threshold, in the unit of the currents; > 0. A number, or an array that broadcasts against
        the current (one threshold a channel, say), traced or not: it is trained through the rate, and the simulation
        uses the same values.
      leak: factor the membrane potential keeps from one step to the next, in (0, 1]; 1 is IF. A number: the rate in
        equilibrium does not depend on it, so it has no gradient.
      initial_potential: membrane potential before the first step, in units of `threshold`, in [0, 1).
        After T steps under a constant current of c thresholds, 0 <= c <= 1, a neuron without a leak has spiked
        floor(T c + initial_potential) times. Half a threshold makes that a rounding, so the rate is off by at most
        1/(2T); from rest it is a truncation, off by up to 1/T.

    Raises:
      UserError: a value is outside its range.
    """

    threshold: ArrayLike = 1.0
    leak: float = 1.0
    initial_potential: float = 0.5

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        for name in ("leak", "initial_potential"):
            if isinstance(getattr(self, name), jax.core.Tracer):
                raise UserError(
                    f"neuron.{name} is traced, but the equilibrium does not depend on it and gives it no gradient: "
                    "pass a number."
                )
        if not 0 < self.leak <= 1:
            raise UserError(f"neuron.leak is {self.leak}: set it in (0, 1]; 1 means no leak (IF).")
        if not 0 <= self.initial_potential < 1:
            raise UserError(
                f"neuron.initial_potential is {self.initial_potential}: set it in [0, 1), as a fraction of "
                "the threshold."
            )

    def initial_state(self, current: Shape) -> Population:
        """The potential before a reset that leads to `initial_potential` (at a leak below 1, to rounding)."""
        potential = jax.ShapeDtypeStruct(current.shape, potential_dtype(current))
        threshold = _like(self.threshold, potential)
        u = self.initial_potential * threshold / self.leak
        return jnp.broadcast_to(jnp.where(u >= threshold, u + threshold, u), current.shape)

    def after_reset(self, u: Population) -> Population:
        """The membrane potential that the next step starts from: `u` after its spike, if any, and the leak."""
        threshold = _like(self.threshold, u)
        u = u - jnp.where(u >= threshold, threshold, jnp.zeros((), u.dtype))
        return u if self.leak == 1 else u * self.leak

    def step(self, state: Population, current: Population) -> tuple[Population, Population]:
        """One time step (Eq. 2 and 11)."""
        u = self.after_reset(state) + current.astype(state.dtype)
        return u, (u >= _like(self.threshold, u)).astype(current.dtype)

    def rate(self, current: Population) -> Population:
        """DBReLU of the current over the threshold (Eq. 10)."""
        return dbrelu(_in_thresholds(current, self.threshold))


def IF(threshold: ArrayLike = 1.0, initial_potential: float = 0.5) -> LIF:  # noqa: N802 (the field's name)
    """Integrate-and-fire neurons: `LIF` with `leak = 1`."""
    return LIF(threshold=threshold, leak=1.0, initial_potential=initial_potential)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["threshold"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TernaryIF:
    """Integrate-and-fire neurons that spike up and down: activity -1, 0 or 1.

    One step is `u <- u + current; s = sign(u) where |u| >= threshold, else 0; u <- u - threshold * s`. The rate in
    equilibrium is `clip(current / threshold, -1, 1)`. The potential starts from 0, as both directions are alike.

    Attributes:
      threshold: as for `LIF`.

    Raises:
      UserError: the threshold is not above 0.
    """

    threshold: ArrayLike = 1.0

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    @property
    def leak(self) -> float:
        """No leak."""
        return 1.0

    def initial_state(self, current: Shape) -> Population:
        """A potential of 0."""
        return jnp.zeros(current.shape, potential_dtype(current))

    def step(self, state: Population, current: Population) -> tuple[Population, Population]:
        """One time step."""
        threshold = _like(self.threshold, state)
        u = state + current.astype(state.dtype)
        spikes = (u >= threshold).astype(u.dtype) - (u <= -threshold).astype(u.dtype)
        return u - threshold * spikes, spikes.astype(current.dtype)

    def rate(self, current: Population) -> Population:
        """`clip(current / threshold, -1, 1)`."""
        return bounded(_in_thresholds(current, self.threshold), -1.0, 1.0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["threshold"],
    meta_fields=["levels", "initial_potential"],
)
@dataclasses.dataclass(frozen=True)
class GradedIF:
    """Integrate-and-fire neurons of graded spikes: 0, 1, ... or `levels` in one step.

    One step is `u <- u + current; s = clip(floor(u / threshold), 0, levels); u <- u - threshold * s`. The rate in
    equilibrium is `clip(current / threshold, 0, levels)`.

    Attributes:
      levels: the largest spike, >= 1; 1 gives `IF`.
      threshold: as for `LIF`: what a spike of 1 takes from the potential.
      initial_potential: as for `LIF`.

    Raises:
      UserError: a value is outside its range.
    """

    levels: int = 2
    threshold: ArrayLike = 1.0
    initial_potential: float = 0.5

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if self.levels < 1:
            raise UserError(f"neuron.levels is {self.levels}: a spike needs at least 1 level.")
        if not 0 <= self.initial_potential < 1:
            raise UserError(f"neuron.initial_potential is {self.initial_potential}: set it in [0, 1).")

    @property
    def leak(self) -> float:
        """No leak."""
        return 1.0

    def initial_state(self, current: Shape) -> Population:
        """`initial_potential` thresholds."""
        potential = jax.ShapeDtypeStruct(current.shape, potential_dtype(current))
        return jnp.broadcast_to(self.initial_potential * _like(self.threshold, potential), current.shape)

    def step(self, state: Population, current: Population) -> tuple[Population, Population]:
        """One time step."""
        threshold = _like(self.threshold, state)
        u = state + current.astype(state.dtype)
        spikes = jnp.clip(jnp.floor(u / threshold), 0, self.levels)
        return u - threshold * spikes, spikes.astype(current.dtype)

    def rate(self, current: Population) -> Population:
        """`clip(current / threshold, 0, levels)`."""
        return bounded(_in_thresholds(current, self.threshold), 0.0, float(self.levels))
