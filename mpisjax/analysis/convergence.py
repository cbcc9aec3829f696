"""How the firing rates approach the equilibrium, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.firing import RateReading
from mpisjax.neurons import Neuron
from mpisjax.residuals import sample_norms
from mpisjax.simulate import Step, accumulate, firing_rate, over_time, timing, wide_zeros

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
    neuron: Neuron,
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
    temporal = time_axis is not None
    when = timing(x, num_steps, time_axis)
    leak = neuron.leak

    def start(shapes: dict[str, Any]) -> Any:
        return (
            wide_zeros(init),
            wide_zeros(when.example) if temporal else (),
            jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(init))),
        )

    def observe(seen: Any, step: Step) -> tuple[Any, Curves]:
        total, frames, weight = seen
        before, total = firing_rate(total, weight), accumulate(total, step.feedback, leak)
        frames = accumulate(frames, step.x, leak) if temporal else ()
        weight = leak * weight + 1
        rates = jax.tree.map(lambda r, i: r.astype(i.dtype), firing_rate(total, weight), init)
        mean_x = firing_rate(frames, weight) if temporal else x
        stepped = transition(params, rates, mean_x, RateReading(neuron))
        curves = Curves(
            change=sample_norms(jax.tree.map(jnp.subtract, rates, before)),
            residual=sample_norms(jax.tree.map(jnp.subtract, stepped, rates)),
            norm=sample_norms(rates),
        )
        return (total, frames, weight), curves

    return over_time(
        transition,
        params,
        x,
        init,
        neuron=neuron,
        num_steps=num_steps,
        observer=observe,
        start=start,
        time_axis=time_axis,
    )[1]
