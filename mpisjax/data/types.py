"""What a data set, a split and a batch are; the first two check what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mpisjax.errors import UserError


class Examples(Protocol):
    """What the inputs of a split offer: a NumPy array does, and so do frames that are unpacked as they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, C], or [N, T, H, W, C] for event sets."""

    @property
    def dtype(self) -> Any:
        """uint8."""

    def __len__(self) -> int:
        """The number of examples, N."""

    def __getitem__(self, index: Any, /) -> Any:
        """The examples of an array of indices or a slice, as uint8."""


@dataclass(frozen=True)
class Split:
    """Examples and their classes.

    Attributes:
        images: uint8 [N, H, W, C] for static sets, uint8 [N, T, H, W, C] frames for event sets. An event set's may be
            unpacked from disk as they are indexed; `np.asarray(split.images[indices])` is right for both.
        labels: int32 [N], 0 or above. Other integers become int32.

    Raises:
        UserError: If it holds something else.
    """

    images: Examples
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Checks what it holds."""
        shape, dtype = getattr(self.images, "shape", None), getattr(self.images, "dtype", None)
        if shape is None or dtype != np.uint8 or len(shape) not in (4, 5):
            what = type(self.images).__name__ if shape is None else f"{dtype} {list(shape)}"
            raise UserError(
                f"the images of a split are {what}: give uint8 [N, H, W, C], or [N, T, H, W, C] for frames"
            )
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"the labels of a split are {labels.dtype} {list(labels.shape)}: give int32 [N], one class an image"
            )
        if len(labels) != shape[0]:
            raise UserError(
                f"a split has {shape[0]} images and {len(labels)} labels: give one label for each image"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < 2**31:
            raise UserError(
                f"the labels of a split go from {labels.min()} to {labels.max()}: number the classes from 0"
            )
        object.__setattr__(self, "labels", labels.astype(np.int32, copy=False))


@dataclass(frozen=True)
class DataSet:
    """A data set, split three ways.

    Attributes:
        name: Its name in the configuration.
        num_classes: The number of classes.
        train: What is trained on: the official train split less the validation examples.
        validation: Held out of the train split by `split_seed` alone; may be empty.
        test: The official test split, for the final evaluation only.
        mean: Per channel, of the train pixels / 255. Zero for event sets, so that "no event" stays zero.
        std: Per channel, of the train pixels / 255. 1 / 255 for event sets, so that frames keep their counts.
        temporal: Whether an example is a sequence of frames.
        source: One sentence: where the data came from and whether it is complete.
        checksum: SHA-256 of the pixels (or frames) and labels loaded, train and test, before validation is held out.

    Raises:
        UserError: If its parts do not fit together: a label that is no class, images of another shape, a mean or a
            standard deviation that is not finite.
    """

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: bool
    source: str
    checksum: str

    def __post_init__(self) -> None:
        """Checks that its parts fit together."""
        shape = tuple(self.train.images.shape[1:])
        if len(shape) != (4 if self.temporal else 3):
            wanted = "[N, T, H, W, C]" if self.temporal else "[N, H, W, C]"
            raise UserError(
                f"the data set {self.name} has images of shape {list(shape)}, but temporal is {self.temporal}: give"
                f" {wanted}"
            )
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if tuple(split.images.shape[1:]) != shape:
                raise UserError(
                    f"the {name} images of {self.name} have the shape {list(split.images.shape[1:])}, but those of train"
                    f" {list(shape)}: give all splits the same"
                )
            if len(split.labels) and split.labels.max() >= self.num_classes:
                raise UserError(
                    f"the {name} labels of {self.name} go up to {split.labels.max()}, but its {self.num_classes} classes"
                    f" are 0 to {self.num_classes - 1}: number the classes from 0, or raise num_classes"
                )
        for name in ("mean", "std"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != shape[-1:] or not np.isfinite(values).all():
                raise UserError(
                    f"the {name} of {self.name} is {getattr(self, name)}: give {shape[-1]} finite numbers, one a channel"
                )
        if min(self.std) <= 0:
            raise UserError(f"the std of {self.name} is {self.std}: give numbers above 0")


class Batch(NamedTuple):
    """A batch.

    Attributes:
        images: uint8 [B, H, W, C] or [B, T, H, W, C].
        labels: int32 [B].
        mask: float32 [B], 0 for rows that only fill up the last batch of an evaluation.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


class Loaded(NamedTuple):
    """What a reader hands over: both official splits, whole.

    Attributes:
        train_images: uint8 [N, ...].
        train_labels: int32 [N].
        test_images: uint8 [M, ...].
        test_labels: int32 [M].
    """

    train_images: Examples
    train_labels: np.ndarray
    test_images: Examples
    test_labels: np.ndarray
