"""What a population of neurons gives: its firing rate, or the spikes of one time step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from mpisjax.firing.primitive import Fired, Rule
from mpisjax.firing.tracing import OfAllBranches, Traced, follow
from mpisjax.meshes import typed_like
from mpisjax.neurons import Neuron


def rates(default: Neuron) -> Rule:
    """The rate reading: each population at the rate it settles at. Its state is that rate (DBReLU, Eq. 10)."""

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Array]:
        rate = (neuron or default).rate(current)
        return rate, rate

    return rule


def spikes(default: Neuron, of: Callable[[Neuron], Neuron] = lambda neuron: neuron) -> Rule:
    """The spiking reading: one time step. A population's state is a `Fired`, of which the next step takes the state.

    Args:
      default: the network's neuron.
      of: what is made of each neuron first (a surrogate derivative, say).
    """

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Fired]:
        state, activity = of(neuron or default).step(state, current)
        return activity, Fired(state, activity)

    return rule


def initial_states(
    traced: Traced, default: Neuron, *args: Any, of: Callable[[Neuron], Neuron] = lambda neuron: neuron
) -> dict[str, Any]:
    """The states of all populations before the first step.

    The function is run for the neurons' parameters, which it may compute; under `jit` nothing else of it is left.
    """

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Any]:
        state = of(neuron or default).initial_state(current)
        return current, typed_like(state, [jax.typeof(current)] * len(jax.tree.leaves(state)))

    return follow(traced, rule, OfAllBranches(), *args)[1]


class RateReading:
    """`fire` read as rates, for calling a transition directly: `transition(params, rates, x, RateReading(neuron))`.

    Args:
      neuron: the network's neuron.

    Attributes:
      activity: after the transition ran, the firing rate of every population by name.
    """

    def __init__(self, neuron: Neuron) -> None:
        self.neuron = neuron
        self.activity: dict[str, Array] = {}

    def __call__(self, name: str, current: Array, neuron: Neuron | None = None) -> Array:
        """The population's rate."""
        self.activity[name] = (neuron or self.neuron).rate(current)
        return self.activity[name]
