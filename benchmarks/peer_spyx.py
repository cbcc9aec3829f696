"""16C3-32C3-48C3s2-FC10 in Spyx, as its quickstart does it: a scan over time steps in one compiled program."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import spyx
import spyx.nn as snn
import spyx.optimize
from flax import nnx

from benchmarks.same_layers import CLASSES, LAYERS, Learner


def make(num_steps: int) -> Learner:
    """The network and its optimiser, for so many time steps."""
    first, second, third = LAYERS
    rngs, spike = nnx.Rngs(0), spyx.axn.arctan()
    net = snn.Sequential(
        nnx.Conv(1, first, (3, 3), rngs=rngs),
        snn.IF((28, 28, first), activation=spike),
        nnx.Conv(first, second, (3, 3), rngs=rngs),
        snn.IF((28, 28, second), activation=spike),
        nnx.Conv(second, third, (3, 3), strides=2, rngs=rngs),
        snn.IF((14, 14, third), activation=spike),
        snn.Flatten(),
        nnx.Linear(third * 14 * 14, CLASSES, rngs=rngs),
        snn.LI((CLASSES,), rngs=rngs),
    )
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    loss_of = spyx.fn.integral_crossentropy(time_axis=0)

    def potentials(net: nnx.Module, images: jnp.ndarray) -> jnp.ndarray:
        x = jnp.broadcast_to(images[..., None], (num_steps, *images.shape, 1))
        return snn.run(net, x)[0]

    def loss(net: nnx.Module, images: jnp.ndarray, labels: jnp.ndarray) -> jnp.ndarray:
        return loss_of(potentials(net, images), labels)

    update = spyx.optimize.make_train_step(loss)

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        return float(update(net, optimizer, images, labels))

    classes = nnx.jit(lambda net, images: potentials(net, images).sum(0).argmax(-1))

    def answer(images: np.ndarray) -> np.ndarray:
        return np.asarray(classes(net, images))

    return Learner(step, answer)
