"""`mpisjax.fit` with plain JAX: one implicit layer of 400 neurons, fully connected, as the first networks of IDE
training.

M. Xiao et al., "Training Feedback Spiking Neural Networks by Implicit Differentiation on the Equilibrium State", 2021.

python -m examples.fit_dense                 # scikit-learn's digits
python -m examples.fit_dense fashion_mnist   # which must be at hand or can be downloaded
"""

import sys

import jax
import jax.numpy as jnp
import optax

import mpisjax
from mpisjax import data

HIDDEN = 400


class Dense:
    """A `mpisjax.nn.Network` in pure functions: no running statistics, so what was given is returned."""

    def __init__(self, classes):
        self.classes = classes

    def init(self, key, images):
        """Random weights; the feedback starts weak, so that the rates settle."""
        pixels = images[0].size
        shapes = {"in": (pixels, HIDDEN), "back": (HIDDEN, HIDDEN), "out": (HIDDEN, self.classes)}
        keys = jax.random.split(key, len(shapes))
        params = {k: jax.random.normal(r, s) / s[0] ** 0.5 for r, (k, s) in zip(keys, shapes.items(), strict=True)}
        return {"params": {**params, "back": 0.3 * params["back"], "bias": jnp.zeros(HIDDEN)}}

    def initial_rates(self, images):
        """One population is fed back."""
        return jnp.zeros((len(images), HIDDEN))

    def encode(self, variables, images, train):
        """The current that drives the neurons, the same at each step."""
        p = variables["params"]
        return images.reshape(len(images), -1) @ p["in"] + p["bias"], variables["batch_stats"]

    def transition(self, variables, rates, x, fire, train):
        """Feedback and input in, activity out."""
        return fire("hidden", x + rates @ variables["params"]["back"]), variables["batch_stats"]

    def classify(self, variables, rates, train):
        """A linear readout."""
        return rates @ variables["params"]["out"], variables["batch_stats"]


def main(workdir="runs/fit_dense", epochs=40, name="digits"):
    """Trains by solved rates, measures by 30 steps of spikes; returns the test accuracies."""
    dataset = data.load(name, num_validation=180)
    _, result = mpisjax.fit(
        Dense(dataset.num_classes),
        dataset,
        workdir=workdir,
        epochs=epochs,
        batch_size=64,
        forward=mpisjax.RateForward("anderson", max_steps=20, tol=1e-3),
        optimizer=lambda steps: optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=0.05),
        augmentation=data.Augmentation(rotate=15.0, zoom=0.15),
        label_smoothing=0.1,
        averaging=0.99,
        on_epoch=lambda state, m: print(f"epoch {m['epoch']}: validation {100 * m['accuracy']:.1f}%"),
    )
    found = {"equivalent path": result.test["accuracy"], "spikes": result.test["accuracy_spikes"]}
    print("test accuracy:", ", ".join(f"{k} {v:.1%}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main(name=sys.argv[1] if len(sys.argv) > 1 else "digits")
