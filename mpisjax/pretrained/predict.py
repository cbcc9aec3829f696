"""Answers of a trained network: classes, probabilities, spikes and steps, for arrays and for image files."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.analysis.anytime import answers_over_time, first_sure
from mpisjax.baselines import bptt
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import prepare_images
from mpisjax.errors import UserError
from mpisjax.nn import model
from mpisjax.pretrained.familiar import channel_rates
from mpisjax.pretrained.images import read_image
from mpisjax.pretrained.inputs import Inputs, as_pixels
from mpisjax.simulate import SpikeForward


class Prediction(NamedTuple):
    """What a network says to n images.

    Attributes:
        classes: The name of each image's class.
        labels: int [n], the number of that class.
        probabilities: float32 [n, classes].
        spikes: int [n], spikes of all neurons in the steps that were used.
        steps: int [n], time steps that were used.
        novelty: float [n], how unlike the training data each image is (`mpisjax.pretrained.familiar`): 99 of 100
            images like them stay below 1. Not a number where the network's card does not say.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    spikes: np.ndarray
    steps: np.ndarray
    novelty: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """float32 [n], the probability of the class that is named."""
        return self.probabilities.max(-1)


def predict(
    trained: Any,
    images: Any,
    *,
    forward: SpikeForward,
    through_time: BPTT | None,
    fit: str,
    confidence: float | None,
    value_range: tuple[float, float] | None,
    batch_size: int,
) -> Prediction:
    """`Trained.predict`, with what its settings stand for: the simulation, the readout, and how files are fitted."""
    inputs, familiar = trained.inputs, trained.familiar
    variables, about = trained.variables, {"net": trained.net, "inputs": inputs, "neuron": trained.neuron}
    if confidence is not None and not 0 < confidence <= 1:
        raise UserError(f"confidence is {confidence}: give a probability above 0, at most 1")
    batch = as_batch(images, inputs, fit)
    found = []
    for first in range(0, max(len(batch), 1), batch_size):
        part = batch[first : first + batch_size]
        # Of few sizes, so that few programs are compiled.
        size = min(batch_size, 1 << (len(part) - 1).bit_length())
        filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
        pixels = as_pixels(filled, inputs, value_range)
        if confidence is None:
            answers = _simulate(variables, pixels, forward=forward, through_time=through_time, **about)
            probabilities, spikes, steps = jax.device_get(answers)
        else:
            answers = _over_time(variables, pixels, num_steps=forward.num_steps, **about)
            probabilities, spikes = jax.device_get(answers)
            at = first_sure(probabilities.max(-1), confidence)
            chosen = np.arange(size)
            probabilities, spikes, steps = probabilities[at, chosen], spikes[at, chosen], at + 1
        novelty = np.full(size, np.nan)
        if familiar is not None:
            novelty = familiar.novelty(np.asarray(channel_rates(variables, pixels, **about)))
        found.append([a[: len(part)] for a in (probabilities, spikes, steps, novelty)])
    probabilities, spikes, steps, novelty = (np.concatenate(parts) for parts in zip(*found, strict=True))
    labels = probabilities.argmax(-1)
    names = tuple(inputs.classes[n] for n in labels)
    spikes, steps = np.rint(spikes).astype(np.int64), steps.astype(np.int64)
    return Prediction(names, labels, probabilities, spikes, steps, novelty)


def as_batch(images: Any, inputs: Inputs, fit: str) -> np.ndarray:
    """One image or many, arrays or files, as an array [n, ...]; the pixels stay as they are."""
    if isinstance(images, str | os.PathLike):
        images = [images]
    if isinstance(images, Sequence) and all(isinstance(one, str | os.PathLike) for one in images):
        read = [read_image(Path(one), inputs, fit=fit)[0] for one in images]
        return np.stack(read) if read else np.zeros((0, *inputs.shape), np.uint8)
    array, rank = np.asarray(images), len(inputs.shape)
    if inputs.shape[-1] == 1 and array.shape[-1:] != (1,) and array.ndim in (rank - 1, rank):
        array = array[..., None]
    return array[None] if array.ndim == rank else array


@functools.partial(jax.jit, static_argnames=("net", "inputs", "neuron", "forward", "through_time"))
def _simulate(
    variables: Any, pixels: Any, *, net: Any, inputs: Any, neuron: Any, forward: Any, through_time: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities, spikes and steps of a whole simulation, answered as the network was trained to."""
    x = prepare_images(pixels, inputs)
    simulation = model.spikes(net, variables, x, neuron=neuron, forward=forward)
    if through_time is None:
        rates, _, _ = model.equivalent_step(net, variables, x, simulation.rates, neuron)
        logits = model.classify(net, variables, rates)
    elif through_time.readout == "rate":
        logits = model.classify(net, variables, simulation.rates)
    else:
        logits = bptt.apply(net, variables, x, neuron=neuron, num_steps=forward.num_steps, bptt=through_time).logits
    counts = [jnp.sum(c, axis=tuple(range(1, c.ndim))) for c in simulation.spike_counts.values()]
    spikes = sum(counts, jnp.zeros(len(pixels), counts[0].dtype))
    return jax.nn.softmax(logits), spikes, jnp.broadcast_to(simulation.num_steps, spikes.shape)


@functools.partial(jax.jit, static_argnames=("net", "inputs", "neuron", "num_steps"))
def _over_time(variables: Any, pixels: Any, *, net: Any, inputs: Any, neuron: Any, num_steps: int) -> Any:
    x = prepare_images(pixels, inputs)
    found = answers_over_time(net, variables, x, neuron=neuron, num_steps=num_steps)
    return jax.nn.softmax(found.logits), found.spikes
