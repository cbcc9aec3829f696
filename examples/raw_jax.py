"""`equilibrium_forward` from plain JAX: a small spiking network learns scikit-learn's digits, in seconds.

python -m examples.raw_jax
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import mpisjax

NEURON = mpisjax.IF(threshold=1.0)
HIDDEN, FED_BACK, CLASSES = 64, 32, 10


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


def main(steps=150):
    """Trains by solved rates, then counts spikes; returns the test accuracies."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    train, test = slice(0, 1437), slice(1437, None)
    shapes = {
        "in": (64, HIDDEN),
        "back": (FED_BACK, HIDDEN),
        "out": (HIDDEN, FED_BACK),
        "head": (FED_BACK, CLASSES),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    p = {k: jax.random.normal(key, s) / s[0] ** 0.5 for key, (k, s) in zip(keys, shapes.items(), strict=True)}
    p = {**p, "back": 0.3 * p["back"], "bias": jnp.zeros(HIDDEN)}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(p, state):
        value, gradient = jax.value_and_grad(loss)(p, x[train], y[train])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(p, updates), state, value

    state = optimizer.init(p)
    for k in range(steps):
        p, state, value = step(p, state)
        if k % 50 == 0 or k == steps - 1:
            print(f"step {k}: loss {value:.3f}")
    found = {}
    for forward in (mpisjax.RateForward("anderson"), mpisjax.SpikeForward(10), mpisjax.SpikeForward(100)):
        scores, eq = jax.jit(logits, static_argnums=2)(p, x[test], forward)
        name = "rates" if isinstance(forward, mpisjax.RateForward) else f"{forward.num_steps} steps of spikes"
        found[name] = float(jnp.mean(jnp.argmax(scores, -1) == y[test]))
        print(f"{name}: test accuracy {100 * found[name]:.1f}%, mean residual {float(jnp.mean(eq.residual)):.4f}")
    return found


if __name__ == "__main__":
    main()
