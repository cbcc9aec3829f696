"""What a network computes: synaptic operations of its spikes, multiply-accumulates of the rest, energy, traffic.

A synaptic operation (SynOp) is one spike that reaches one synapse: an addition. Products that no spike drives are
counted as multiply-accumulates (MACs). In an `MPIS` these are the stem and the injection (once a sample, since their
input is constant; event input drives them every step), the head (once), and the fusion's convolutions, which act on
currents, in every step. Products with padding are not counted.

A network is not described a second time for this. Its trace is followed from each population to the convolutions and
matrix products that its spikes reach. So a network of one's own is counted as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.firing import Population, trace
from mpisjax.neurons import Neuron
from mpisjax.nn.model import transition_of
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.products import INPUT, PARAMETERS, STEP, NotFollowedError, Products, RateProducts, Value

# Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: 45 nm, 0.9 V, 32-bit
# floating point; in pJ. A 64-bit read of a 1 MB SRAM costs 100 pJ, so 32 bits 50.
ADD_PJ, MULTIPLY_PJ, SRAM_PJ = 0.9, 3.7, 50.0
MAC_PJ = ADD_PJ + MULTIPLY_PJ
CONSTANTS = (
    "Horowitz, ISSCC 2014, 45 nm, 32-bit floating point: addition 0.9 pJ, multiply-accumulate 4.6 pJ, 32-bit "
    "access to a 1 MB SRAM 50 pJ (half of a 64-bit one). Memory traffic assumes no reuse, an upper bound: a "
    "synaptic operation reads a weight and reads and writes a membrane potential; a multiply-accumulate reads a "
    "weight and an activity; an update of a neuron reads and writes its potential."
)
ONCE, EVERY_STEP = "once a sample", "in every step"


class Cost(NamedTuple):
    """What one sample costs; means over samples.

    Attributes:
        synops: Synaptic operations by population that fires.
        macs: Multiply-accumulates: `ONCE`, and over all steps of what runs in `EVERY_STEP`.
        additions: Of currents (fusion and injection), over all steps.
        updates: Of neurons, over all steps: an addition each, and a multiplication where there is a leak.
        compute_uj: Energy of arithmetic, in microjoules.
        memory_uj: Energy of memory traffic, in microjoules.
    """

    synops: dict[str, float]
    macs: dict[str, float]
    additions: float
    updates: float
    compute_uj: float
    memory_uj: float


class Operations(NamedTuple):
    """What a network computes for one sample, but for how often its neurons fire.

    Attributes:
        fan_out: By population, in its neurons' shape: how many synapses a neuron's spike reaches.
        once: MACs of what depends on a constant input alone, and of the head.
        every_step: MACs of a time step that no spike drives.
        additions: Of whole currents in a time step.
        neurons: How many fire.
    """

    fan_out: dict[str, np.ndarray]
    once: float
    every_step: float
    additions: float
    neurons: int

    def synops(self, spikes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Synaptic operations by population, float [batch]; `spikes` are counts [batch, ...] by population."""
        return {
            name: jnp.tensordot(spikes[name].astype(jnp.float32), jnp.asarray(reached, jnp.float32), reached.ndim)
            for name, reached in self.fan_out.items()
        }

    def cost(self, synops: dict[str, float], num_steps: float, leak: float) -> Cost:
        """Adds it all up for one sample.

        Args:
            synops: By population, of a sample over all steps.
            num_steps: Time steps.
            leak: Of the neurons; a leak below 1 costs a multiplication an update.
        """
        macs = {ONCE: self.once, EVERY_STEP: self.every_step * num_steps}
        updates, added = self.neurons * num_steps, self.additions * num_steps
        events, products = sum(synops.values()), sum(macs.values())
        compute = ADD_PJ * (events + added + updates) + MAC_PJ * products + (MULTIPLY_PJ * updates if leak < 1 else 0)
        memory = SRAM_PJ * (3 * events + 2 * products + 2 * updates)
        return Cost(synops, macs, added, updates, compute * 1e-6, memory * 1e-6)


def count_operations(net: Any, variables: Any, images: Any, neuron: Neuron) -> Operations | None:
    """Reads what a network computes from its trace.

    Args:
        net: An `MPIS`, or a network of one's own (`mpisjax.nn.network.as_module`).
        variables: `{"params": ..., "batch_stats": ...}`. Only shapes are read, of these and of the images.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        neuron: Of the populations that bring none.

    Returns:
        None where populations or products stand inside a loop or a branch, which is not followed.
    """
    products = Products()
    populations = _follow(net, variables, images, neuron, products)
    if populations is None:
        return None
    with jax.ensure_compile_time_eval():  # these numbers are no part of a program that is being traced
        fan_out, macs = products.count(populations)
    neurons = sum(math.prod(population.shape) for population in populations.values())
    return Operations(fan_out, macs[INPUT], macs[STEP], products.additions, neurons)


def dense_cost(net: Any, variables: Any, images: Any, neuron: Neuron, evaluations: float) -> Cost | None:
    """The same network solved as rates: `evaluations` of f with every product dense; stem, injection and head once.

    The other arguments, and None, are as of `count_operations`.
    """
    products = RateProducts()
    if _follow(net, variables, images, neuron, products) is None:
        return None
    with jax.ensure_compile_time_eval():
        _, macs = products.count({})
    counted = {ONCE: macs[INPUT], EVERY_STEP: evaluations * macs[STEP]}
    total = sum(counted.values())
    return Cost({}, counted, 0.0, 0.0, MAC_PJ * total * 1e-6, 2 * SRAM_PJ * total * 1e-6)


def _follow(net: Any, variables: Any, images: Any, neuron: Neuron, products: Products) -> dict[str, Population] | None:
    """Shows a network to `products`, in the shapes of one sample; returns its populations."""
    if isinstance(net, MPIS):
        net = net.clone(dtype=None, sharding=None)  # counts are exact in float32, on one device
    axis = 1 if net.temporal else 0

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def outside(method: str) -> Callable[..., Any]:
        return lambda variables, value: net.apply(variables, value, False, method=method)

    variables = jax.tree.map(shape, variables)
    one = jax.ShapeDtypeStruct((*images.shape[:axis], 1, *images.shape[axis + 1 :]), images.dtype)
    init = jax.eval_shape(lambda: net.initial_rates(one))
    x = jax.eval_shape(outside("encode"), variables, one)
    if net.temporal:
        x = jax.tree.map(lambda frames: jax.ShapeDtypeStruct(frames.shape[1:], frames.dtype), x)
    transition = trace(transition_of(net), variables, init, x)

    fixed, rates, driving = (
        [Value(depends)] * len(jax.tree.leaves(tree))
        for depends, tree in ((PARAMETERS, variables), (STEP, init), (products.frames if net.temporal else INPUT, x))
    )
    try:
        # What is fed back are the spikes that the transition returned in the step before.
        back = type(products)().follow(transition.jaxpr, [*fixed, *rates, *driving])
        products.follow(transition.jaxpr, [*fixed, *back, *driving])
        for method, value in (("encode", one), ("classify", init)):
            traced = jax.make_jaxpr(outside(method))(variables, value)
            products.follow(traced.jaxpr, [*fixed, *[Value(INPUT)] * len(jax.tree.leaves(value))])
    except NotFollowedError:
        return None
    return transition.populations
