"""`mpisjax.fit` with Flax NNX: a module is split into its variables, and merged again: `python -m examples.fit_nnx`.

An NNX module changes as it runs, and what is traced must be pure. So every function makes a module of its own from the
variables, and hands back the running statistics that it has gathered.
"""

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import mpisjax
from mpisjax import data

WIDTH = 256


class Module(nnx.Module):
    """The layers."""

    def __init__(self, rngs):
        self.inject = nnx.Linear(64, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.back = nnx.Linear(WIDTH, WIDTH, kernel_init=nnx.initializers.normal(0.03), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)


class Network:
    """The module as an `mpisjax.nn.Network`."""

    def init(self, key, images):
        """Parameters and running statistics, as plain dicts."""
        _, params, stats = nnx.split(Module(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def merged(self, variables):
        """A module that holds the variables."""
        graph, *states = nnx.split(nnx.eval_shape(lambda: Module(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)
        for state, name in zip(states, ("params", "batch_stats"), strict=True):
            nnx.replace_by_pure_dict(state, variables[name])
        return nnx.merge(graph, *states)

    def initial_rates(self, images):
        return jnp.zeros((len(images), WIDTH))

    def encode(self, variables, images, train):
        """The input's current, normalised; in training its statistics join the running ones."""
        module = self.merged(variables)
        current = module.norm(module.inject(images.reshape(len(images), -1)), use_running_average=not train)
        return current, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    def transition(self, variables, rates, x, fire, train):
        """Feedback and input in, activity out."""
        return fire("hidden", x + self.merged(variables).back(rates)), variables["batch_stats"]

    def classify(self, variables, rates, train):
        return self.merged(variables).head(rates), variables["batch_stats"]


def main(workdir="runs/fit_nnx", epochs=40):
    """Trains by solved rates, measures by 30 steps of spikes; returns the test accuracies."""
    digits = load_digits()
    _, result = mpisjax.fit(
        Network(),
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
