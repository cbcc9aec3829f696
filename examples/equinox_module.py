"""`equilibrium_forward` from Equinox: the module itself is `params`, and its arrays get the gradients.

pip install equinox && python examples/equinox_module.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mpisjax
from mpisjax import data
from mpisjax.data import digits

NEURON = mpisjax.LIF(threshold=1.0, leak=0.99)
PIXELS, HIDDEN, FED_BACK, CLASSES = 64, 256, 64, 10
BATCH = 64
TURNED = data.Augmentation(rotate=15.0, zoom=0.15)


class Network(eqx.Module):
    """One implicit stream of two layers, and a classifier."""

    inject: eqx.nn.Linear
    back: eqx.nn.Linear
    out: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.inject = eqx.nn.Linear(PIXELS, HIDDEN, key=keys[0])
        self.back = eqx.nn.Linear(FED_BACK, HIDDEN, use_bias=False, key=keys[1])
        self.out = eqx.nn.Linear(HIDDEN, FED_BACK, key=keys[2])
        self.head = eqx.nn.Linear(FED_BACK, CLASSES, key=keys[3])


def transition(network, rates, x, fire):
    """The network of one sample: Equinox layers take no batch."""
    hidden = fire("hidden", network.inject(x) + network.back(rates))
    return fire("out", network.out(hidden))


def logits(network, x, forward):
    """One sample's logits; `vmap` makes the batch."""
    eq = mpisjax.equilibrium_forward(
        transition, network, x, jnp.zeros(FED_BACK), neuron=NEURON, forward=forward, batch_axis=None
    )
    return network.head(eq.rates), eq


def loss(network, x, y):
    """Cross-entropy over a batch."""
    forward = mpisjax.RateForward("picard", max_steps=15, tol=1e-3)
    scores, _ = jax.vmap(lambda one: logits(network, one, forward))(x)
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def main(epochs=40, seed=0):
    """Trains by solved rates, then counts spikes; returns the test accuracies."""
    (images, labels), (x_test, y_test) = digits.load_images()
    batches = len(images) // BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, epochs * batches), weight_decay=0.05)

    @eqx.filter_jit
    def step(network, state, key, x, y):
        x = data.augment(key, x[..., None], TURNED).reshape(BATCH, PIXELS)
        value, gradient = eqx.filter_value_and_grad(loss)(network, x, y)
        updates, state = optimizer.update(gradient, state, eqx.filter(network, eqx.is_array))
        return eqx.apply_updates(network, updates), state, value

    key = jax.random.key(seed)
    network = Network(key)
    state = optimizer.init(eqx.filter(network, eqx.is_array))
    for k in range(1, epochs + 1):
        key, shuffle, *keys = jax.random.split(key, batches + 2)
        order = jax.random.permutation(shuffle, len(images))[: batches * BATCH].reshape(batches, BATCH)
        for rows, turn in zip(order, keys, strict=True):
            network, state, value = step(network, state, turn, images[rows], labels[rows])
        if k % 10 == 0 or k == epochs:
            print(f"epoch {k}: loss {value:.3f}")
    found = {}
    for name, forward in (
        ("rates", mpisjax.RateForward("picard")),
        ("10 steps of spikes", mpisjax.SpikeForward(10)),
        ("50 steps of spikes", mpisjax.SpikeForward(50)),
    ):
        scores, eq = eqx.filter_jit(jax.vmap(lambda one, f=forward: logits(network, one, f)))(
            x_test.reshape(-1, PIXELS)
        )
        found[name] = float(jnp.mean(jnp.argmax(scores, -1) == y_test))
        print(f"{name}: test accuracy {100 * found[name]:.1f}%, mean residual {float(jnp.mean(eq.residual)):.4f}")
    return found


if __name__ == "__main__":
    main()
