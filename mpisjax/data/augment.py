"""Normalisation and augmentation, inside `jit` and per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.typing import DTypeLike


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Scales bytes by 255, then to zero mean and unit variance.

    Args:
        images: uint8 [..., C].
        mean: Per channel, of the pixels / 255.
        std: Per channel, of the pixels / 255.

    Returns:
        float32 [..., C].
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    offset = -jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    channels = [1] * (images.ndim - 1) + [-1]
    return images.astype(jnp.float32) * scale.reshape(channels) + offset.reshape(channels)


class Inputs(Protocol):
    """What preparing images needs to know; a `DataSet` knows it."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of the pixels / 255."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of the pixels / 255."""

    @property
    def temporal(self) -> bool:
        """Whether an example is a sequence of frames."""

    @property
    def steps_per_frame(self) -> int:
        """For how many steps of a simulation each frame is the input."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""


def prepare_images(images: jax.Array, inputs: Inputs, dtype: DTypeLike | None = None) -> jax.Array:
    """Makes a batch of bytes a network's input.

    Args:
        images: uint8 [B, H, W, C] or [B, T, H, W, C].
        inputs: Their mean and standard deviation, whether they are frames, and for how many steps each frame stays.
        dtype: Of the result; None: float32.

    Returns:
        Normalised images, [B, H, W, C] or [T * steps_per_frame, B, H, W, C].
    """
    x = normalize(images, inputs.mean, inputs.std)
    x = x if dtype is None else x.astype(dtype)
    return over_time(x, inputs.steps_per_frame) if inputs.temporal else x


def over_time(frames: jax.Array, steps_per_frame: int = 1) -> jax.Array:
    """[B, T, ...] -> [T * steps_per_frame, B, ...]: the input of every step, as a network reads it."""
    return jnp.repeat(frames.swapaxes(0, 1), steps_per_frame, axis=0)


class Augmentation(NamedTuple):
    """How `augment` changes a sample; False or 0 leaves a change out.

    Attributes:
        flip: Mirror left to right with probability 1/2.
        rotate: Turn by up to so many degrees.
        zoom: Scale by a factor of up to 1 + zoom, or its inverse.
        shift: Move by up to so many pixels on both axes.
        cutout: Side in pixels of a blanked square.
    """

    flip: bool = False
    rotate: float = 0.0
    zoom: float = 0.0
    shift: int = 0
    cutout: int = 0


def augment(key: jax.Array, images: jax.Array, config: Augmentation) -> jax.Array:
    """Flips, turns, zooms, shifts and cuts out, each sample by its own draw.

    A sample's draw depends on the key and on its place in the (global) batch, so that it does not matter how many
    devices share the batch. All frames of an event sample share one draw. What comes in from outside, and a cut-out
    square, is 0: apply this to bytes, before `normalize`, where 0 is black (or no event).

    Args:
        key: The step's random key.
        images: [B, H, W, C] or [B, T, H, W, C], any dtype.
        config: What to do. Turns and zooms are about the centre, by bilinear interpolation. A cut-out square has its
            centre anywhere in the image (T. DeVries and G. Taylor, 2017).

    Returns:
        As `images`.
    """
    if not (config.flip or config.rotate or config.zoom or config.shift or config.cutout):
        return images
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(images.shape[0]))
    return jax.vmap(lambda one, image: _augment_one(one, image, config))(keys, images)


def _augment_one(key: jax.Array, image: jax.Array, config: Augmentation) -> jax.Array:
    """One sample, [..., H, W, C]."""
    flip_key, shift_key, cutout_key = jax.random.split(key, 3)
    height, width = image.shape[-3:-1]
    if config.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[..., ::-1, :], image)
    if config.rotate or config.zoom:
        # A key of its own: the draws of recipes without it stay what they were.
        angle, size = jax.random.uniform(jax.random.fold_in(key, 3), (2,), minval=-1.0, maxval=1.0)
        image = _turned(image, jnp.deg2rad(config.rotate * angle), (1 + config.zoom) ** size)
    if config.shift:
        by = jax.random.randint(shift_key, (2,), -config.shift, config.shift + 1)
        image = _take_shifted(_take_shifted(image, by[0], -3), by[1], -2)
    if config.cutout:
        centre = jax.random.randint(cutout_key, (2,), 0, jnp.array([height, width]))
        rows = _inside(centre[0], height, config.cutout)
        columns = _inside(centre[1], width, config.cutout)
        hole = rows[:, None, None] & columns[None, :, None]
        image = jnp.where(hole, jnp.zeros((), image.dtype), image)
    return image


def _turned(image: jax.Array, angle: jax.Array, size: jax.Array) -> jax.Array:
    """The image turned counter-clockwise (in radians) and magnified about its centre."""
    height, width = image.shape[-3:-1]
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)
    y, x = jnp.meshgrid(rows - middle[0], columns - middle[1], indexing="ij")
    cosine, sine = jnp.cos(angle) / size, jnp.sin(angle) / size
    source = (cosine * y + sine * x + middle[0], cosine * x - sine * y + middle[1])
    planes = jnp.moveaxis(image, -1, -3).reshape(-1, height, width).astype(jnp.float32)
    planes = jax.vmap(lambda plane: map_coordinates(plane, list(source), order=1, mode="constant"))(planes)
    if jnp.issubdtype(image.dtype, jnp.integer):
        planes = jnp.round(planes)
    moved = planes.reshape(*image.shape[:-3], image.shape[-1], height, width).astype(image.dtype)
    return jnp.moveaxis(moved, -3, -1)


def _take_shifted(image: jax.Array, by: jax.Array, axis: int) -> jax.Array:
    """The image moved by `by` pixels along an axis, zeros coming in."""
    source = jnp.arange(image.shape[axis]) - by
    valid = (source >= 0) & (source < image.shape[axis])
    moved = jnp.take(image, source, axis, mode="clip")
    shape = [1] * image.ndim
    shape[axis] = image.shape[axis]
    return jnp.where(valid.reshape(shape), moved, jnp.zeros((), image.dtype))


def _inside(centre: jax.Array, length: int, side: int) -> jax.Array:
    """bool [length]: which places lie in an interval of `side` places around the centre."""
    first = centre - side // 2
    place = jnp.arange(length)
    return (place >= first) & (place < first + side)


def mixup(key: jax.Array, images: jax.Array, one_hot: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blends every sample with the one in the mirrored place of the batch (H. Zhang et al., "mixup", 2018).

    Args:
        key: The step's random key.
        images: float [B, ...], normalised.
        one_hot: float [B, K], the targets.
        alpha: Both parameters of the beta distribution that the weight is drawn from, once a batch; 0 blends nothing.

    Returns:
        Images and targets, blended by the same weight.
    """
    if not alpha:
        return images, one_hot
    weight = jax.random.beta(key, alpha, alpha)
    blended = [(weight * a + (1 - weight) * a[::-1]).astype(a.dtype) for a in (images, one_hot)]
    return blended[0], blended[1]
