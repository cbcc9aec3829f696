"""`equilibrium_forward` from Equinox: the module itself is `params`, and its arrays get the gradients.

pip install equinox && python -m examples.equinox_module
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import mpisjax

NEURON = mpisjax.LIF(threshold=1.0, leak=0.99)
FED_BACK = 32


class Network(eqx.Module):
    """One implicit stream of two layers, and a classifier."""

    inject: eqx.nn.Linear
    back: eqx.nn.Linear
    out: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key, hidden=64):
        keys = jax.random.split(key, 4)
        self.inject = eqx.nn.Linear(64, hidden, key=keys[0])
        self.back = eqx.nn.Linear(FED_BACK, hidden, use_bias=False, key=keys[1])
        self.out = eqx.nn.Linear(hidden, FED_BACK, key=keys[2])
        self.head = eqx.nn.Linear(FED_BACK, 10, key=keys[3])


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


def main(steps=150):
    """Trains by solved rates, then tests; returns the test accuracies."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    train, test = slice(0, 1437), slice(1437, None)
    network = Network(jax.random.key(0))
    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(network, state):
        value, gradient = eqx.filter_value_and_grad(loss)(network, x[train], y[train])
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(network, updates), state, value

    state = optimizer.init(eqx.filter(network, eqx.is_array))
    for k in range(steps):
        network, state, value = step(network, state)
        if k % 50 == 0 or k == steps - 1:
            print(f"step {k}: loss {value:.3f}")
    found = {}
    for name, forward in (
        ("rates", mpisjax.RateForward("picard")),
        ("50 steps of spikes", mpisjax.SpikeForward(50)),
    ):
        scores, eq = eqx.filter_jit(jax.vmap(lambda one, f=forward: logits(network, one, f)))(x[test])
        found[name] = float(jnp.mean(jnp.argmax(scores, -1) == y[test]))
        print(f"{name}: test accuracy {100 * found[name]:.1f}%, mean residual {float(jnp.mean(eq.residual)):.4f}")
    return found


if __name__ == "__main__":
    main()
