"""How unlike the training data an input is: a network answers whatever it is shown, and should say when it does not
know it.

An input drives each channel of each population by some mean rate. Over the training data these rates fill a region,
which is described by its mean and its main axes (probabilistic principal components; M. Tipping and C. Bishop, 1999).
The novelty of an input is its distance from that region, in units of the distance that 99 of 100 held-out examples
keep.
"""

from __future__ import annotations

import base64
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.data import Split, eval_batches, prepare_images
from mpisjax.nn import model

AXES = 8
MOST_TRAIN, MOST_HELD_OUT, BATCH = 2000, 1000, 128  # examples that are looked at, and at once
USUAL = 0.99  # of held-out examples have a novelty of at most 1


class Familiar(NamedTuple):
    """The region that the training data fill.

    Attributes:
        mean: float [d], of the d channels' rates.
        axes: float [k, d], the main axes.
        scales: float [k], standard deviations along them.
        rest: Standard deviation along any other axis.
        limit: The distance that is usual.
    """

    mean: np.ndarray
    axes: np.ndarray
    scales: np.ndarray
    rest: float
    limit: float

    def novelty(self, rates: np.ndarray) -> np.ndarray:
        """How unlike the training data inputs are: [n, d] -> [n]; 1 is the limit of what is usual."""
        off = rates - self.mean
        along = off @ self.axes.T
        outside = np.maximum((off**2).sum(1) - (along**2).sum(1), 0)
        return np.sqrt(((along / self.scales) ** 2).sum(1) + outside / self.rest**2) / self.limit

    def to_card(self) -> dict[str, Any]:
        """As JSON: the arrays are little-endian float16, in base64."""
        arrays = {name: getattr(self, name).astype("<f2").tobytes() for name in ("mean", "axes", "scales")}
        texts = {name: base64.b64encode(data).decode() for name, data in arrays.items()}
        return {**texts, "rest": self.rest, "limit": self.limit}

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> Familiar:
        """What `to_card` was called on, as far as float16 keeps it."""
        mean, axes, scales = (
            np.frombuffer(base64.b64decode(card[name]), "<f2").astype(np.float64) for name in ("mean", "axes", "scales")
        )
        return cls(mean, axes.reshape(len(scales), len(mean)), scales, card["rest"], card["limit"])


@functools.partial(jax.jit, static_argnames=("net", "inputs", "neuron"))
def channel_rates(variables: Any, pixels: Any, *, net: Any, inputs: Any, neuron: Any) -> jax.Array:
    """The mean rate of every channel, of all populations in their order, before any feedback arrives.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.
        pixels: A batch of images from 0 to 255, [batch, *inputs.shape].
        net: The network.
        inputs: Normalisation and kind of input.
        neuron: Its neurons.

    Returns:
        float32 [batch, d].
    """
    x = prepare_images(pixels, inputs)
    _, rates, _ = model.equivalent_step(net, variables, x, net.initial_rates(x), neuron)
    return jnp.concatenate([jnp.mean(r, axis=tuple(range(1, r.ndim - 1))) for r in rates.values()], -1)


def measure(net: Any, variables: Any, inputs: Any, neuron: Any, train: Split, held_out: Split) -> Familiar:
    """Looks at training data and at held-out ones.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        inputs: Normalisation and kind of input.
        neuron: Its neurons.
        train: What it was trained on.
        held_out: What it was not trained on; where that is empty, every fourth of the training examples instead.
    """

    def rates_of(split: Split, most: int) -> np.ndarray:
        chosen = np.unique(np.linspace(0, len(split.labels) - 1, min(most, len(split.labels))).astype(int))
        part = Split(np.asarray(split.images[chosen]), split.labels[chosen])
        about = {"net": net, "inputs": inputs, "neuron": neuron}
        found = [channel_rates(variables, batch.images, **about) for batch in eval_batches(part, BATCH)]
        return np.concatenate([np.asarray(one, np.float64) for one in found])[: len(chosen)]

    rates = rates_of(train, MOST_TRAIN)
    if len(held_out.labels):
        others = rates_of(held_out, MOST_HELD_OUT)
    else:
        others, rates = rates[::4], np.delete(rates, slice(None, None, 4), axis=0)
    mean = rates.mean(0)
    _, sizes, axes = np.linalg.svd(rates - mean, full_matrices=False)
    scales = np.maximum(sizes / np.sqrt(len(rates)), 1e-3)
    number = min(AXES, len(scales) - 1)
    rest = float(np.sqrt((scales[number:] ** 2).sum() / max(len(mean) - number, 1)))
    region = Familiar(mean, axes[:number], scales[:number], max(rest, 1e-3), 1.0)
    region = Familiar.from_card(region.to_card())  # rounded as it is kept
    return region._replace(limit=float(np.quantile(region.novelty(others), USUAL)))
