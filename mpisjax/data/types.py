"""What a data set, a split and a batch are."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


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


class Split(NamedTuple):
    """Examples and their classes.

    Attributes:
        images: uint8 [N, H, W, C] for static sets, uint8 [N, T, H, W, C] frames for event sets. An event set's may be
            unpacked from disk as they are indexed; `np.asarray(split.images[indices])` is right for both.
        labels: int32 [N].
    """

    images: Examples
    labels: np.ndarray


class DataSet(NamedTuple):
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
