"""`mpisjax.fit` with a recurrent layer on spike trains, in the format of SHD (the Spiking Heidelberg Digits, B. Cramer
et al., 2020).

python -m examples.fit_shd        # 1,000 small recordings made in SHD's format: they are not SHD
python -m examples.fit_shd DIR    # the set's own shd_train.h5 and shd_test.h5
"""

import sys
from pathlib import Path

import flax.linen as nn
import h5py
import jax.numpy as jnp
import numpy as np
import optax

import mpisjax
from mpisjax import data

WIDTH, CLASSES, CHANNELS = 128, 20, 700  # of the layer; of SHD


def write_words(path, number, rng):
    """Words of three tones, each a cloud of spikes about a channel and a time, among spikes of noise."""
    centres = np.random.default_rng(0).uniform((40, 0.1), (660, 0.9), (CLASSES, 3, 2))
    labels = rng.permutation(np.arange(number) % CLASSES)
    with h5py.File(path, "w") as file:
        times = file.create_dataset("spikes/times", (number,), h5py.vlen_dtype(np.float16))
        units = file.create_dataset("spikes/units", (number,), h5py.vlen_dtype(np.uint16))
        for n, label in enumerate(labels):
            spoken = centres[label] + rng.normal(0, (15, 0.05), (3, 2))
            tones = np.repeat(spoken, 40, 0) + rng.normal(0, (15, 0.05), (120, 2))
            spikes = np.concatenate([tones, rng.uniform((0, 0), (CHANNELS, 1), (60, 2))]).clip(0, (CHANNELS - 1, 1))
            units[n], times[n] = spikes[spikes[:, 1].argsort()].T
        file["labels"] = labels.astype(np.uint16)


class Recurrent(nn.Module):
    """A layer whose spikes come back to it through weights of its own."""

    temporal = True  # images are frames over time: [time, batch, 1, 1, channels]

    def setup(self):
        self.inject, self.norm, self.head = nn.Dense(WIDTH), nn.BatchNorm(momentum=0.9), nn.Dense(CLASSES)
        self.back = nn.Dense(WIDTH, use_bias=False, kernel_init=nn.initializers.normal(0.03))

    def initial_rates(self, images):
        return jnp.zeros((images.shape[1], WIDTH))

    def encode(self, images, train):
        return self.norm(self.inject(images.reshape(*images.shape[:2], -1)), use_running_average=not train)

    def transition(self, rates, x, fire, train):
        return fire("hidden", x + self.back(rates))

    def classify(self, rates, train):
        return self.head(rates)


def main(workdir="runs/fit_shd", epochs=10, folder=None):
    """Trains by the spikes of the frames; returns the test accuracies."""
    words = f"{workdir}_words"
    if folder is None:
        Path(words).mkdir(parents=True, exist_ok=True)
        for seed, (split, number) in enumerate({"train": 800, "test": 200}.items()):
            write_words(Path(words, f"shd_{split}.h5"), number, np.random.default_rng(1 + seed))
    dataset = data.load("shd", dir=folder or words, cache_dir=words, num_frames=20, validation_share=0.2)
    how = {"workdir": workdir, "epochs": epochs, "batch_size": 32, "optimizer": optax.adamw(2e-3, weight_decay=0.1)}
    _, result = mpisjax.fit(Recurrent(), dataset, forward=mpisjax.SpikeForward(None), **how)
    print(f"test accuracy: {result.test['accuracy']:.1%}, by spikes {result.test['accuracy_spikes']:.1%}")
    return {name: result.test[name] for name in ("accuracy", "accuracy_spikes")}


if __name__ == "__main__":
    main(folder=sys.argv[1] if len(sys.argv) > 1 else None)
