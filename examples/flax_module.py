"""`equilibrium_forward` from Flax (linen): a module's `apply` is the transition.

python -m examples.flax_module
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import mpisjax

NEURON = mpisjax.IF(threshold=1.0)
FED_BACK = 16


class Streams(nn.Module):
    """Two streams of rates, fused: any pytree of rates will do."""

    hidden: int = 48

    @nn.compact
    def __call__(self, rates, x, fire):
        """One pass: rates, input, neurons -> rates."""
        a = fire("a", nn.Dense(self.hidden)(x) + nn.Dense(self.hidden, use_bias=False)(0.3 * rates["slow"]))
        fast = fire("fast", nn.Dense(FED_BACK)(a) + nn.Dense(FED_BACK, use_bias=False)(0.3 * rates["fast"]))
        return {"fast": fast, "slow": fire("slow", nn.Dense(FED_BACK)(fast))}


class Classifier(nn.Module):
    """A dense layer on both streams' rates."""

    @nn.compact
    def __call__(self, rates):
        """Rates -> logits."""
        return nn.Dense(10)(jnp.concatenate([rates["fast"], rates["slow"]], axis=-1))


def logits(variables, x, forward):
    """The equilibrium's rates, classified."""
    zeros = jnp.zeros((len(x), FED_BACK))
    eq = mpisjax.equilibrium_forward(
        Streams().apply,
        variables["streams"],
        x,
        {"fast": zeros, "slow": zeros},
        neuron=NEURON,
        forward=forward,
    )
    return Classifier().apply(variables["head"], eq.rates), eq


def loss(variables, x, y):
    """Cross-entropy; gradients flow to every variable, through the equilibrium."""
    scores, _ = logits(variables, x, mpisjax.SpikeForward(20))  # trained on spikes, as the paper does
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def main(steps=120):
    """Trains on spikes and tests; returns the test accuracies."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    train, test = slice(0, 1437), slice(1437, None)
    zeros = jnp.zeros((1, FED_BACK))
    rates = {"fast": zeros, "slow": zeros}
    fire = mpisjax.firing.RateReading(NEURON)
    variables = {
        "streams": Streams().init(jax.random.key(0), rates, x[:1], fire),
        "head": Classifier().init(jax.random.key(1), rates),
    }
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        value, gradient = jax.value_and_grad(loss)(variables, x[train], y[train])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    state = optimizer.init(variables)
    for k in range(steps):
        variables, state, value = step(variables, state)
        if k % 40 == 0 or k == steps - 1:
            print(f"step {k}: loss {value:.3f}")
    scores, eq = jax.jit(logits, static_argnums=2)(variables, x[test], mpisjax.SpikeForward(20))
    found = {"20 steps of spikes": float(jnp.mean(jnp.argmax(scores, -1) == y[test]))}
    residuals = ", ".join(f"{k} {float(jnp.mean(v)):.3f}" for k, v in eq.residual.items())
    print(f"test accuracy {100 * found['20 steps of spikes']:.1f}%, residual by stream: {residuals}")
    return found


if __name__ == "__main__":
    main()
