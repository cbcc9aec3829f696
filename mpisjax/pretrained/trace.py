"""One image through a trained network, step by step: spikes, rates as they settle, and what the classifier says."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.analysis.dynamics import raster
from mpisjax.data import prepare_images
from mpisjax.nn import model
from mpisjax.pretrained import Trained


class Trace(NamedTuple):
    """What happened in T time steps.

    Attributes:
        spikes: bool [T, neurons] by population.
        rates: float [T] by population: mean firing rate of the steps so far, leak-weighted.
        scores: float [T, classes]: softmax of the classifier on the last layers' rates of the steps so far.
        equivalent: float [classes]: the same after one step of the equivalent map on the rates at the end.
    """

    spikes: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    scores: np.ndarray
    equivalent: np.ndarray

    def spikes_until(self, step: int) -> int:
        """Spikes of all populations in the first `step` steps."""
        return int(sum(spikes[:step].sum() for spikes in self.spikes.values()))

    @property
    def num_neurons(self) -> int:
        """Neurons of all populations."""
        return sum(spikes.shape[1] for spikes in self.spikes.values())


def trace(trained: Trained, image: np.ndarray, num_steps: int | None = None) -> Trace:
    """Simulates a network on one image and keeps everything.

    Args:
        trained: The network.
        image: uint8 of `trained.inputs.shape`.
        num_steps: Time steps; None as its config says. Input over time has as many as frames.
    """
    net, variables, neuron = trained.net, trained.variables, trained.neuron
    x = prepare_images(jnp.asarray(image)[None], trained.inputs)
    spikes = raster(net, variables, x, neuron, num_steps or trained.forward.num_steps)
    shapes = net.initial_rates(x)
    last = {name: f"{name}/layer{len(net.layers)}" for name in shapes}
    settling = {
        name: running_rates(spikes[last[name]], neuron.leak).reshape(-1, *r.shape[1:]) for name, r in shapes.items()
    }

    @jax.jit
    def answers(variables: Any, rates: Any) -> tuple[jax.Array, jax.Array]:
        final = jax.tree.map(lambda r: r[-1:], rates)
        better, _, _ = model.equivalent_step(net, variables, x, final, neuron)
        classify = lambda r: jax.nn.softmax(model.classify(net, variables, r))  # noqa: E731
        return classify(rates), classify(better)[0]

    dtype = jax.tree.leaves(shapes)[0].dtype
    scores, equivalent = answers(variables, jax.tree.map(lambda r: jnp.asarray(r, dtype), settling))
    means = {name: running_rates(s.mean(1, keepdims=True), neuron.leak)[:, 0] for name, s in spikes.items()}
    return Trace(spikes, means, np.asarray(scores), np.asarray(equivalent))


def running_rates(spikes: np.ndarray, leak: float) -> np.ndarray:
    """Firing rates of the steps up to each one, Eq. 3: [T, neurons] of spikes -> [T, neurons]."""
    total, weight = np.zeros(spikes.shape[1:]), 0.0
    found = np.zeros(spikes.shape)
    for t, fired in enumerate(spikes):
        total, weight = leak * total + fired, leak * weight + 1
        found[t] = total / weight
    return found
