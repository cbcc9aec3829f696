"""16C3-32C3-48C3s2-FC10 in mpisjax: the stem, and one stream of two layers with its feedback."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.same_layers import KERNEL, LAYERS, Learner
from mpisjax import configuration
from mpisjax.configuration import makers
from mpisjax.cpu import cores
from mpisjax.data import Batch, Split
from mpisjax.nn import model
from mpisjax.training.state import evaluated_variables


def make(num_steps: int, how: str) -> Learner:
    """The network and its optimiser.

    Args:
        num_steps: Time steps.
        how: "rates": the equilibrium is solved for; "few": in fewer steps, with which `benchmarks.user.RECIPE`
            trains; "spikes": it is found by simulation; "bptt": the simulation is differentiated through time.
    """
    cores.prepare()
    from benchmarks.nets import STEPS_PER_EPOCH, Images  # after the cores are settled

    config = configuration.base()
    config.model.update(stem=LAYERS[:1], layers=LAYERS[1:], num_streams=1, kernel_size=KERNEL, head="smallest")
    config.forward.update(mode="rates" if how in ("rates", "few") else "spikes", num_steps=num_steps)
    few = how == "few"
    for solver, steps in ((config.forward, 3 if few else 4), (config.adjoint, 1 if few else 4)):
        solver.update(max_steps=steps, tol=5e-2 if few else 2e-2, damping=0.3 if few else 0.0)
    config.train.method = "bptt" if how == "bptt" else "implicit"
    about = cast(Any, Images())
    net, neuron = makers.make_network(config, about), makers.make_neuron(config)
    variables = model.init_variables(net, jax.random.key(0), jnp.zeros((2, 28, 28, 1)), neuron)
    state = makers.init_state(config, variables, STEPS_PER_EPOCH)
    update = makers.make_train_step(config, net, about, STEPS_PER_EPOCH)

    examine = makers.make_examiner(config, net, about)

    def split_of(images: np.ndarray, labels: np.ndarray) -> Split:
        return Split(np.rint(255 * images[..., None]).astype(np.uint8), labels.astype(np.int32))

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        nonlocal state
        split, mask = split_of(images, labels), np.ones(len(labels), np.float32)
        arrays: Any = (split.images, split.labels, mask)
        state, metrics = update(state, Batch(*arrays))
        return float(metrics.loss)

    def answer(images: np.ndarray) -> np.ndarray:
        return examine(evaluated_variables(state), split_of(images, np.zeros(len(images)))).answers

    return Learner(step, answer)
