"""How the rates of a network settle on given images, and how stable their equilibrium is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from mpisjax.analysis.convergence import Curves, convergence
from mpisjax.firing import RateReading
from mpisjax.jacobian import SpectralRadius, spectral_radius
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.simulate import weighted_mean_frame
from mpisjax.solvers import RateForward


class Dynamics(NamedTuple):
    """What `dynamics` found.

    Attributes:
        curves: How the rates of a simulation approach the equilibrium; leaves [num_steps, batch].
        radius: by example, the spectral radius of the equivalent map's Jacobian at the equilibrium. Below 1
            the equilibrium is stable.
    """

    curves: Curves
    radius: SpectralRadius


def dynamics(
    net: MPIS,
    variables: dict[str, Any],
    images: jax.Array,
    *,
    neuron: LIF,
    solver: RateForward,
    num_steps: int,
) -> Dynamics:
    """Simulates a network, solves for its equilibrium, and takes the Jacobian's spectral radius there.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        neuron: Its neurons.
        solver: Finds the equilibrium.
        num_steps: Time steps to follow; temporal input has as many as frames.
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

    return Dynamics(*jax.device_get(measure(variables, images)))
