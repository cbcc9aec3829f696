"""What a trained network reads: shape, normalisation and classes, and images brought to its range."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mpisjax.data import DataSet, Split
from mpisjax.errors import UserError


class Inputs(NamedTuple):
    """What a network reads and what its answers mean; `mpisjax.data.DataSet` without the examples.

    Attributes:
        name: The data set's name in the configuration.
        num_classes: The number of classes.
        classes: Their names.
        shape: Of an example: (H, W, C), or (T, H, W, C) for frames.
        mean: Per channel, of the pixels / 255, that training subtracted.
        std: Per channel, of the pixels / 255, that training divided by.
        temporal: Whether an example is a sequence of frames.
        steps_per_frame: For how many steps of a simulation each frame is the input.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: bool
    steps_per_frame: int = 1


def from_json(fields: dict[str, Any]) -> Inputs:
    """What `Inputs._asdict` gave, read from JSON, which has lists for tuples."""
    found: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Inputs(**found)


def without_examples(inputs: Inputs) -> DataSet:
    """A data set like the one that a network was trained on, but for the examples."""
    empty = Split(np.zeros((0, *inputs.shape), np.uint8), np.zeros(0, np.int32))
    about = {key: value for key, value in inputs._asdict().items() if key not in ("shape", "classes")}
    return DataSet(train=empty, validation=empty, test=empty, source="", checksum="", **about)


def as_pixels(images: ArrayLike, inputs: Inputs, value_range: tuple[float, float] | None = None) -> jax.Array:
    """A batch of images in the 0..255 that networks are trained on.

    Args:
        images: [batch, *inputs.shape]: uint8, or any real dtype or bool with `value_range`.
        inputs: What the network reads.
        value_range: The pixel values of black and of white. None: 0 and 255, of uint8 alone.

    Returns:
        uint8 as it was, or float32 scaled to 0..255; nothing is clipped.

    Raises:
        UserError: The shape is another, the dtype leaves the range open, or the range is empty.
    """
    if not isinstance(images, jax.Array | np.ndarray):
        images = np.asarray(images)
    wanted = ", ".join(map(str, inputs.shape))
    if images.shape[1:] != inputs.shape:
        one = images.shape == inputs.shape
        raise UserError(
            f"this network reads images of shape [batch, {wanted}] and was given {list(images.shape)}; "
            + ("add a batch axis, as in images[None]" if one else "bring them to that shape")
        )
    if value_range is None:
        if images.dtype != np.uint8:
            raise UserError(
                f"this network reads uint8 pixels and was given {images.dtype}; say which values are black and white, "
                "as in value_range=(0, 1)"
            )
        return jnp.asarray(images)
    low, high = value_range
    if not -np.inf < low < high < np.inf:
        raise UserError(f"value_range is {value_range!r}: give two finite numbers, black before white")
    return (jnp.asarray(images).astype(jnp.float32) - low) * (255 / (high - low))
