"""What a network does on given images, step by step: its spikes, how its rates settle, and how stable that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.firing import RateReading, trace
from mpisjax.jacobian import SpectralRadius, spectral_radius
from mpisjax.neurons import LIF, Neuron
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.residuals import sample_norms
from mpisjax.simulate import Step, accumulate, firing_rate, over_time, timing, weighted_mean_frame, wide_zeros
from mpisjax.solvers import RateForward


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


def dynamics(
    net: MPIS,
    variables: dict[str, Any],
    images: jax.Array,
    *,
    neuron: LIF,
    solver: RateForward,
    num_steps: int,
) -> tuple[Curves, SpectralRadius]:
    """Simulates a network, solves for its equilibrium, and takes the Jacobian's spectral radius there.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        neuron: Its neurons.
        solver: Finds the equilibrium.
        num_steps: Time steps to follow; temporal input has as many as frames.

    Returns:
        How the rates of the simulation approach the equilibrium, leaves [num_steps, batch]; and by example the spectral
        radius of the equivalent map's Jacobian there. Below 1 the equilibrium is stable.
    """
    transition = model.transition_of(net)

    @jax.jit
    def measure(variables: dict[str, Any], images: jax.Array) -> tuple[Curves, SpectralRadius]:
        x: Any = net.apply(variables, images, False, method="encode")
        curves = convergence(
            transition,
            variables,
            x,
            net.initial_rates(images),
            neuron=neuron,
            num_steps=num_steps,
            time_axis=0 if net.temporal else None,
        )
        solved = model.apply(net, variables, images, neuron=neuron, forward=solver)
        mean_x = weighted_mean_frame(x, neuron.leak) if net.temporal else x
        radius = spectral_radius(
            lambda r: transition(variables, r, mean_x, RateReading(neuron)),
            solved.equilibrium.rates,
            jax.random.key(0),
        )
        return curves, radius

    return jax.device_get(measure(variables, images))


def raster(
    net: MPIS, variables: dict[str, Any], images: jax.Array, neuron: Neuron, num_steps: int | None
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

    def observe(seen: None, step: Step) -> tuple[None, dict[str, jax.Array]]:
        return None, {k: jnp.ravel(fired.activity) > 0 for k, fired in step.populations.items()}

    @jax.jit
    def run(variables: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
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
    one = x[0] if net.temporal else x
    order = trace(model.transition_of(net), variables, net.initial_rates(images), one).populations
    return {k: np.asarray(spikes[k]) for k in order}
