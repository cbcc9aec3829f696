"""How the firing rates approach the equilibrium, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.neurons import LIF, RateReading, SpikeReading, population_shapes, resting_potentials
from mpisjax.residuals import sample_norms

Array = jax.Array


class Curves(NamedTuple):
    """Norms over the time steps; pytrees like `init` with float leaves [num_steps, batch].

    Attributes:
      change: ||r(t) - r(t-1)||, with r(0) = 0: how much the rates still move.
      residual: ||f(r(t)) - r(t)||: how far they are from the equilibrium of f.
      norm: ||r(t)||, to read the others against.
    """

    change: Any
    residual: Any
    norm: Any


def convergence(
    transition: Callable[..., Any],
    params: Any,
    x: Any,
    init: Any,
    *,
    neuron: LIF,
    num_steps: int | None,
    time_axis: int | None = None,
) -> Curves:
    """Simulates a transition and follows its rates.

    The two norms say different things: rates that are averages over t steps move by O(1/t) in a step whatever
    they tend to, so a small change is no proof of an equilibrium; a small residual is.

    Args:
      transition: `transition(params, rates, x, fire) -> rates`.
      params: pytree, passed through.
      x: pytree: a constant current, or frames on `time_axis`.
      init: rates pytree, zeros as a rule, samples on axis 0.
      neuron: the neuron's constants.
      num_steps: time steps; with frames, as many as there are.
      time_axis: None, or the frames' axis; f then sees the weighted mean of the frames so far.

    Returns:
      The `Curves`.
    """
    frames = None if time_axis is None else jax.tree.map(lambda a: jnp.moveaxis(a, time_axis, 0), x)
    first = x if frames is None else jax.tree.map(lambda a: a[0], frames)
    shapes = population_shapes(transition, params, init, first)
    zeros = jax.tree.map(jnp.zeros_like, (init, () if frames is None else first))

    def mean(total: Any, weight: Array) -> Any:
        return jax.tree.map(lambda a: a / weight.astype(a.dtype), total)

    def advance(carry: Any, x_t: Any) -> Any:
        potentials, spikes, total, seen, weight = carry
        fire = SpikeReading(neuron, potentials)
        spikes = transition(params, spikes, x if frames is None else x_t, fire)
        before = mean(total, jnp.maximum(weight, 1))
        weight = neuron.leak * weight + 1
        total = jax.tree.map(lambda a, s: neuron.leak * a + s, total, spikes)
        seen = seen if frames is None else jax.tree.map(lambda a, s: neuron.leak * a + s, seen, x_t)
        rates = mean(total, weight)
        stepped = transition(params, rates, x if frames is None else mean(seen, weight), RateReading(neuron))
        curves = Curves(
            change=sample_norms(jax.tree.map(jnp.subtract, rates, before)),
            residual=sample_norms(jax.tree.map(jnp.subtract, stepped, rates)),
            norm=sample_norms(rates),
        )
        return (fire.potentials, spikes, total, seen, weight), curves

    carry = (resting_potentials(neuron, shapes), init, *zeros, jnp.zeros(()))
    return jax.lax.scan(advance, carry, frames, length=num_steps if frames is None else None)[1]
