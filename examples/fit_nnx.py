"""`mpisjax.fit` with Flax NNX: a module with four methods, its batch statistics included: `python -m examples.fit_nnx`.

An NNX module changes as it runs, and what is traced must be pure. `fit` therefore splits it into its variables, and
merges a module of its own for each call.
"""

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import mpisjax
from mpisjax import data

WIDTH = 256


class Network(nnx.Module):
    """A layer of neurons that feeds itself back."""

    def __init__(self, rngs):
        self.inject = nnx.Linear(64, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.back = nnx.Linear(WIDTH, WIDTH, kernel_init=nnx.initializers.normal(0.03), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def initial_rates(self, images):
        return jnp.zeros((len(images), WIDTH))

    def encode(self, images, train):
        """The input's current, normalised; in training its statistics join the running ones."""
        return self.norm(self.inject(images.reshape(len(images), -1)), use_running_average=not train)

    def transition(self, rates, x, fire, train):
        """Feedback and input in, activity out."""
        return fire("hidden", x + self.back(rates))

    def classify(self, rates, train):
        return self.head(rates)


def main(workdir="runs/fit_nnx", epochs=40):
    """Trains by solved rates, measures by 30 steps of spikes; returns the test accuracies."""
    digits = load_digits()
    _, result = mpisjax.fit(
        Network(nnx.Rngs(0)),
        data.from_arrays(digits.images, digits.target, value_range=(0, 16), num_validation=180),
        workdir=workdir,
        epochs=epochs,
        batch_size=64,
        forward=mpisjax.RateForward("picard", max_steps=15, tol=1e-3),
        optimizer=lambda steps: optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=0.1),
        augmentation=data.Augmentation(rotate=15.0, zoom=0.15),
        averaging=0.99,
    )
    print(f"test accuracy: {result.test['accuracy']:.1%}, by spikes {result.test['accuracy_spikes']:.1%}")
    return {name: result.test[name] for name in ("accuracy", "accuracy_spikes")}


if __name__ == "__main__":
    main()
