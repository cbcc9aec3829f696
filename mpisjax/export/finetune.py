"""Fine-tuning with rounded weights: the rate reading is trained, and gradients pass the rounding straight through.

Y. Bengio, N. Leonard and A. Courville, "Estimating or propagating gradients through stochastic neurons", 2013.

What is trained is the folded network, with the rounding and the gains that the exported file will have. Its spikes
and its rates share one fixed point, so no step of time is differentiated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.export import folded, quantise
from mpisjax.export.folded import Form, Layers, Network
from mpisjax.export.polyphase import Folded
from mpisjax.simulate import SpikeForward

Array = jax.Array
LEARNING_RATE = 3e-4  # of Adam; chosen on the validation split of Fashion-MNIST


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rounded:
    """A folded network whose weights lie on their integers, as `mpisjax.fit` trains it (`mpisjax.nn.network`).

    Attributes:
        form: Which parts are neurons.
        start: What training starts from, in float.
        gain: Of every layer; see `quantise.gains`.
        bits: Of a weight.
        mean: Of the pixels, as the data set has it.
        std: Their standard deviation.
    """

    form: Form
    start: Network
    gain: Layers
    bits: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def temporal(self) -> bool:
        """Whether images are frames over time."""
        return self.form.net.temporal

    def __repr__(self) -> str:  # what a run notes of its network
        return f"{self.bits} bits, stem {self.form.stem}, head {self.form.head}, {self.form.net}"

    def init(self, key: Array, images: Array) -> dict[str, Any]:
        """The weights that training starts from."""
        del key, images
        layers = self._scaled(jax.tree.map(np.asarray, self.start.layers), 255 * self.std)
        return {"params": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layers), "batch_stats": {}}

    def trained(self, params: Layers) -> Layers:
        """The layers as `quantise.integers` takes them."""
        layers = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        return self._scaled(layers, 1 / (255 * self.std))

    def _scaled(self, layers: Layers, by: np.ndarray) -> Layers:
        scale = lambda first: Folded(first.kernel * by[:, None].astype(first.kernel.dtype), first.bias)  # noqa: E731
        return quantise.of_first(self.form, layers, scale)

    def _network(self, variables: Any) -> Network:
        # The first layer reads pixels, with small weights: it is trained as if it read normalised images.
        layers = self._scaled(variables["params"], 1 / (255 * self.std))
        layers = quantise.rounded(self.form, layers, self.gain, self.bits, straight_through=True)
        return self.start._replace(layers=layers)

    def initial_rates(self, images: Array) -> dict[str, Array]:
        """Zeros of the rates' shapes."""
        return self.form.initial_rates(images.shape[1 if self.temporal else 0])

    def encode(self, variables: Any, images: Array, train: bool) -> tuple[Array, Any]:
        """The transition's input, from normalised images."""
        del train
        if self.form.stem_spikes:
            scale, offset = 255 * self.std, 255 * self.mean - np.rint(255 * self.mean)
            images = images * jnp.asarray(scale, images.dtype) + jnp.asarray(offset, images.dtype)
        return folded.encode(self.form, self._network(variables), images), {}

    def transition(self, variables: Any, rates: Any, x: Array, fire: Any, train: bool) -> tuple[Any, Any]:
        """One pass of the folded network."""
        del train
        return folded.transition(self.form)(self._network(variables), rates, x, fire), {}

    def classify(self, variables: Any, rates: Any, train: bool) -> tuple[Array, Any]:
        """Logits from rates."""
        del train
        return folded.classify(self.form, self._network(variables), rates), {}


def tuned(network: Rounded, dataset: Any, epochs: int, num_steps: int, folder: Path, **how: Any) -> Layers:
    """Trains the layers, and gives those of the epoch that is best on the validation split.

    Args:
        network: What to train.
        dataset: Its data; the test split is not read.
        epochs: Passes over the train split.
        num_steps: Time steps of the validation.
        folder: Of the run; the same call goes on after an interruption.
        how: Other arguments of `mpisjax.fit`: the solvers, augmentation, label smoothing.
    """
    from mpisjax.data import Split
    from mpisjax.training.fit import fit
    from mpisjax.training.state import adamw, cosine

    unread = dataclasses.replace(dataset, test=Split(dataset.test.images[:0], dataset.test.labels[:0]))
    with jax.enable_x64(False):
        variables, _ = fit(
            network, unread, workdir=folder, epochs=epochs, neuron=network.form.neuron,
            variables=network.init(jax.random.key(0), jnp.zeros(())),
            eval_forward=SpikeForward(None if network.temporal else num_steps),
            optimizer=lambda steps: adamw(cosine(LEARNING_RATE, steps, warmup_steps=steps // 20), weight_decay=0.0),
            **how,
        )  # fmt: skip
    return network.trained(variables["params"])
