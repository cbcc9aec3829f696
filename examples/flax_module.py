"""`equilibrium_forward` from Flax (linen): a module's `apply` is the transition.

python examples/flax_module.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import mpisjax
from mpisjax import data
from mpisjax.data import digits

NEURON = mpisjax.IF(threshold=1.0)
SPIKES = mpisjax.SpikeForward(20)  # trained on spikes, as the paper does
PIXELS, HIDDEN, FED_BACK, CLASSES = 64, 256, 64, 10
BATCH = 64
TURNED = data.Augmentation(rotate=15.0, zoom=0.15)


class Streams(nn.Module):
    """Two streams of rates, fused: any pytree of rates will do."""

    @nn.compact
    def __call__(self, rates, x, fire):
        """One pass: rates, input, neurons -> rates."""
        a = fire("a", nn.Dense(HIDDEN)(x) + nn.Dense(HIDDEN, use_bias=False)(0.3 * rates["slow"]))
        fast = fire("fast", nn.Dense(FED_BACK)(a) + nn.Dense(FED_BACK, use_bias=False)(0.3 * rates["fast"]))
        return {"fast": fast, "slow": fire("slow", nn.Dense(FED_BACK)(fast))}


class Classifier(nn.Module):
    """A dense layer on both streams' rates."""

    @nn.compact
    def __call__(self, rates):
        """Rates -> logits."""
        return nn.Dense(CLASSES)(jnp.concatenate([rates["fast"], rates["slow"]], axis=-1))


def silent(number):
    """The rates where the search starts."""
    return {name: jnp.zeros((number, FED_BACK)) for name in ("fast", "slow")}


def logits(variables, x):
    """The equilibrium's rates, classified."""
    init = silent(len(x))
    eq = mpisjax.equilibrium_forward(Streams().apply, variables["streams"], x, init, neuron=NEURON, forward=SPIKES)
    return Classifier().apply(variables["head"], eq.rates), eq


def loss(variables, x, y):
    """Cross-entropy; gradients flow to every variable, through the equilibrium."""
    scores, _ = logits(variables, x)
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def main(epochs=40, seed=0):
    """Trains on spikes and tests; returns the test accuracy."""
    (images, labels), (x_test, y_test) = digits.load_images()
    batches = len(images) // BATCH
    key = jax.random.key(seed)
    fire = mpisjax.firing.RateReading(NEURON)
    variables = {
        "streams": Streams().init(key, silent(1), jnp.zeros((1, PIXELS)), fire),
        "head": Classifier().init(key, silent(1)),
    }
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, epochs * batches), weight_decay=0.05)
    state = TrainState.create(apply_fn=logits, params=variables, tx=optimizer)

    @jax.jit
    def step(state, x, y):
        x = data.augment(jax.random.fold_in(key, state.step), x[..., None], TURNED).reshape(BATCH, PIXELS)
        value, gradient = jax.value_and_grad(loss)(state.params, x, y)
        return state.apply_gradients(grads=gradient), value

    shuffle = np.random.default_rng(seed)
    for k in range(1, epochs + 1):
        for rows in shuffle.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH):
            state, value = step(state, images[rows], labels[rows])
        if k % 10 == 0 or k == epochs:
            print(f"epoch {k}: loss {value:.3f}")
    scores, eq = jax.jit(logits)(state.params, x_test.reshape(-1, PIXELS))
    accuracy = float(jnp.mean(jnp.argmax(scores, -1) == y_test))
    residuals = ", ".join(f"{name} {float(jnp.mean(v)):.3f}" for name, v in eq.residual.items())
    print(f"20 steps of spikes: test accuracy {100 * accuracy:.1f}%, mean residual by stream: {residuals}")
    return {"20 steps of spikes": accuracy}


if __name__ == "__main__":
    main()
