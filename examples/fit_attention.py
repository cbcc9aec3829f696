"""`mpisjax.fit` with Flax (linen): two streams, one pooled, which attend to one another: `python -m
examples.fit_attention`.

Between neurons a transition is linear in the rates, so that its spikes and its solved rates have one equilibrium. So
the attention weights come from the input, which does not change over time; what they weigh is the other stream's rates.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import mpisjax
from mpisjax import data

WIDTH, ROWS = 64, 8


class Streams(nn.Module):
    """A stream over the eight rows of a digit, and one over the four pairs of rows."""

    def setup(self):
        self.embed = nn.Conv(WIDTH, (3, 8), padding=((1, 1), (0, 0)))  # three rows at a time
        self.norm = nn.BatchNorm(momentum=0.9)
        self.position = self.param("position", nn.initializers.normal(0.5), (ROWS, WIDTH))
        self.query, self.key = nn.Dense(16), nn.Dense(16)
        small = nn.initializers.normal(0.03)
        self.fine_back, self.coarse_back, self.up, self.down = (
            nn.Dense(WIDTH, use_bias=False, kernel_init=small) for _ in range(4)
        )
        self.head = nn.Dense(10)

    def initial_rates(self, images):
        n = len(images)
        return {"fine": jnp.zeros((n, ROWS, WIDTH)), "coarse": jnp.zeros((n, ROWS // 2, WIDTH))}

    def encode(self, images, train):
        """Currents of both streams, and how much each row attends to each pair of rows."""
        rows = self.embed(images)[:, :, 0] + self.position
        fine = self.norm(rows, use_running_average=not train)
        coarse = fine.reshape(len(fine), ROWS // 2, 2, WIDTH).mean(2)  # pooling
        scores = self.query(fine) @ self.key(coarse).swapaxes(1, 2) / 4
        return {"fine": fine, "coarse": coarse, "attention": jax.nn.softmax(scores)}

    def transition(self, rates, x, fire, train):
        """Each stream feeds itself back, and sees the other through the attention."""
        attention = x["attention"]
        seen = attention @ self.up(rates["coarse"])
        back = attention.swapaxes(1, 2) @ self.down(rates["fine"]) / 2
        fine = fire("fine", x["fine"] + self.fine_back(rates["fine"]) + seen)
        coarse = fire("coarse", x["coarse"] + self.coarse_back(rates["coarse"]) + back)
        return {"fine": fine, "coarse": coarse}

    def classify(self, rates, train):
        flat = [rates[name].reshape(len(rates[name]), -1) for name in ("fine", "coarse")]
        return self.head(jnp.concatenate(flat, -1))


def main(workdir="runs/fit_attention", epochs=40):
    """Trains by solved rates, measures by 30 steps of spikes; returns the test accuracies."""
    digits = load_digits()
    _, result = mpisjax.fit(
        Streams(),
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
