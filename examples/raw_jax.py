"""`equilibrium_forward` from plain JAX: a small spiking network learns scikit-learn's digits, in seconds.

python examples/raw_jax.py
"""

import jax
import jax.numpy as jnp
import optax

import mpisjax
from mpisjax import data
from mpisjax.data import digits

NEURON = mpisjax.IF(threshold=1.0)
PIXELS, HIDDEN, FED_BACK, CLASSES = 64, 256, 64, 10
BATCH = 64
TURNED = data.Augmentation(rotate=15.0, zoom=0.15)


def transition(p, rates, x, fire):
    """The network, written once: `fire` is a population of neurons, spiking or read as rates."""
    hidden = fire("hidden", x @ p["in"] + rates @ p["back"] + p["bias"])
    return fire("out", hidden @ p["out"])


def logits(p, x, forward):
    """The equilibrium's rates, classified."""
    init = jnp.zeros((len(x), FED_BACK))
    eq = mpisjax.equilibrium_forward(transition, p, x, init, neuron=NEURON, forward=forward)
    return eq.rates @ p["head"], eq


def loss(p, x, y):
    """Cross-entropy; the gradient is the implicit one."""
    scores, _ = logits(p, x, mpisjax.RateForward("anderson", max_steps=20, tol=1e-3))
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def weights(key):
    """Random weights; the feedback starts weak, so that the rates settle."""
    shapes = {
        "in": (PIXELS, HIDDEN),
        "back": (FED_BACK, HIDDEN),
        "out": (HIDDEN, FED_BACK),
        "head": (FED_BACK, CLASSES),
    }
    keys = jax.random.split(key, len(shapes))
    p = {k: jax.random.normal(r, s) / s[0] ** 0.5 for r, (k, s) in zip(keys, shapes.items(), strict=True)}
    return {**p, "back": 0.3 * p["back"], "bias": jnp.zeros(HIDDEN)}


def main(epochs=40, seed=0):
    """Trains by solved rates, then counts spikes; returns the test accuracies."""
    (images, labels), (x_test, y_test) = jax.tree.map(jnp.asarray, digits.load_images())
    batches = len(images) // BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, epochs * batches), weight_decay=0.05)

    def step(carry, batch):
        (p, state), (key, rows) = carry, batch
        x = data.augment(key, images[rows][..., None], TURNED).reshape(BATCH, PIXELS)
        value, gradient = jax.value_and_grad(loss)(p, x, labels[rows])
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), value

    @jax.jit
    def train(carry, key):  # for an epoch
        order = jax.random.permutation(key, len(images))[: batches * BATCH].reshape(batches, BATCH)
        carry, losses = jax.lax.scan(step, carry, (jax.random.split(key, batches), order))
        return carry, losses.mean()

    key, *keys = jax.random.split(jax.random.key(seed), epochs + 1)
    p = weights(key)
    state = optimizer.init(p)
    for k, key in enumerate(keys, 1):
        (p, state), value = train((p, state), key)
        if k % 10 == 0 or k == epochs:
            print(f"epoch {k}: loss {value:.3f}")
    found = {}
    for forward in (mpisjax.RateForward("anderson"), mpisjax.SpikeForward(10), mpisjax.SpikeForward(100)):
        scores, eq = jax.jit(logits, static_argnums=2)(p, x_test.reshape(-1, PIXELS), forward)
        name = "rates" if isinstance(forward, mpisjax.RateForward) else f"{forward.num_steps} steps of spikes"
        found[name] = float(jnp.mean(jnp.argmax(scores, -1) == y_test))
        print(f"{name}: test accuracy {100 * found[name]:.1f}%, mean residual {float(jnp.mean(eq.residual)):.4f}")
    return found


if __name__ == "__main__":
    main()
