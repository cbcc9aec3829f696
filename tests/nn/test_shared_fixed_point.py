"""Both readings of one network share a fixed point: the spikes' rates approach the rates' equilibrium as 1/T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import random_images, random_variables

import mpisjax
from mpisjax import SpikeForward, nn

pytestmark = pytest.mark.unoptimized

STEPS = np.array([16, 64, 256, 1024])
# One stream has no fusion.
NETS = [(1, 1, (4, 6)), *((n, k, (4, 6)) for n in (2, 3) for k in (1, 2)), *((2, k, (4, 5, 6)) for k in (1, 3))]


@functools.cache
def distances(streams, fusion, layers, size, leak):
    """||r_T - r*|| / ||r*|| over all streams for T in STEPS, averaged over 4 samples; and the solve of r*."""
    net = nn.MPIS(num_classes=3, stem=(4,), layers=layers, num_streams=streams, fusion_layer=fusion)
    images = random_images(streams, 4, *size, 2)
    variables = random_variables(net, images, seed=10 * streams + fusion)
    neuron = mpisjax.LIF(1.0, leak)

    def distance(a, b):
        return jnp.sqrt(sum(jnp.sum((a[k] - b[k]) ** 2, axis=(1, 2, 3)) for k in a))

    @jax.jit
    def run(variables, images):
        solved = nn.apply(
            net, variables, images, neuron=neuron, forward=mpisjax.RateForward("picard", 200, 1e-6)
        ).equilibrium
        x = net.apply(variables, images, False, method="encode")
        gaps = []
        for steps in STEPS:
            found = mpisjax.simulate(
                nn.transition_of(net),
                variables,
                x,
                net.initial_rates(images),
                neuron=neuron,
                forward=SpikeForward(int(steps)),
            )
            gaps.append(distance(found.rates, solved.rates) / distance(solved.rates, net.initial_rates(images)))
        return jnp.stack(gaps), solved

    gaps, solved = jax.device_get(run(variables, images))
    assert gaps.shape == (len(STEPS), 4)
    return gaps.mean(1), solved


def slope(gaps):
    return np.polyfit(np.log(STEPS), np.log(gaps), 1)[0]


@pytest.mark.parametrize(("streams", "fusion", "layers"), NETS)
def test_without_leak_the_distance_falls_as_one_over_the_steps(streams, fusion, layers):
    gaps, solved = distances(streams, fusion, layers, (7, 8) if fusion == 1 else (8, 8), 1.0)
    assert solved.converged.all(), "the network does not contract: another seed or smaller parameters"
    for rates in solved.rates.values():
        assert 0.05 < rates.mean() < 0.9 and ((rates > 0.01) & (rates < 0.99)).mean() > 0.2
    assert -1.1 < slope(gaps) < -0.9, gaps
    assert gaps[-1] < 0.02


def test_with_leak_the_distance_stops_falling_at_a_bias_of_the_order_of_the_leak():
    weak, _ = distances(2, 2, (4, 6), (8, 8), 0.98)
    strong, _ = distances(2, 2, (4, 6), (8, 8), 0.9)
    for gaps in (weak, strong):
        assert gaps[-1] == pytest.approx(gaps[-2], rel=0.15)
    assert 2 < strong[-1] / weak[-1] < 10  # (1 - 0.9) / (1 - 0.98) = 5
    assert weak[-1] > 0.01


@pytest.mark.parametrize("leak", [0.5, 0.9, 0.98])
def test_a_single_leaky_neuron_is_biased_low_by_what_its_potential_holds(x64, leak):
    """Sum the step over time: r_T = c / threshold - u_T / (threshold sum_t leak^(T-t+1)), u_T in [0, leak)."""
    currents = np.linspace(0.02, 0.98, 25)
    threshold, steps = 1.0, 400
    found = mpisjax.simulate(
        lambda p, z, x, fire: fire("a", x),
        {},
        currents[None],
        np.zeros((1, 25)),
        neuron=mpisjax.LIF(threshold, leak, 0.0),
        forward=SpikeForward(steps),
    ).rates[0]
    u = np.zeros(25)
    for _ in range(steps):
        u = u + currents
        u = leak * (u - threshold * (u >= threshold))
    weight = sum(leak ** (steps - t) for t in range(1, steps + 1))
    np.testing.assert_allclose(found, currents - u / (leak * weight), atol=1e-12)
    bias = currents - found
    assert (bias > -1e-12).all() and bias.max() < 1.001 / weight
    assert bias.max() > 0.5 * (1 - leak)  # it stays, however long the simulation
