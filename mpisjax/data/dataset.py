"""What a data set, a split and a batch are, and how a data set is put together from what a reader hands over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mpisjax.errors import UserError

# uint8 [N, H, W, C], or [N, T, H, W, C] for event sets: a NumPy array, or what offers its `shape`, `dtype`, `len()` and
# indexing by an array of indices or a slice, such as frames that are unpacked as they are read.
Examples = Any


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
            raise UserError(f"the images of a split are {what}: give uint8 [N, H, W, C], or [N, T, H, W, C] for frames")
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"the labels of a split are {labels.dtype} {list(labels.shape)}: give int32 [N], one class an image"
            )
        if len(labels) != shape[0]:
            raise UserError(f"a split has {shape[0]} images and {len(labels)} labels: give one label for each image")
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
        classes: The name of each class; empty where only their numbers are known.
        steps_per_frame: For how many steps of a simulation each frame is the input; potentials are carried on.

    Raises:
        UserError: If its parts do not fit together: a label that is no class, images of another shape, a mean or a
            standard deviation that is not finite, names for some of the classes alone.
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
    classes: tuple[str, ...] = ()
    steps_per_frame: int = 1

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
                    f"the {name} images of {self.name} have the shape {list(split.images.shape[1:])}, but those of "
                    f"train {list(shape)}: give all splits the same"
                )
            if len(split.labels) and split.labels.max() >= self.num_classes:
                raise UserError(
                    f"the {name} labels of {self.name} go up to {split.labels.max()}, but its {self.num_classes} "
                    f"classes are 0 to {self.num_classes - 1}: number the classes from 0, or raise num_classes"
                )
        for name in ("mean", "std"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != shape[-1:] or not np.isfinite(values).all():
                raise UserError(
                    f"the {name} of {self.name} is {getattr(self, name)}: give {shape[-1]} finite numbers, one a "
                    "channel"
                )
        if min(self.std) <= 0:
            raise UserError(f"the std of {self.name} is {self.std}: give numbers above 0")
        if self.steps_per_frame < 1 or (self.steps_per_frame > 1 and not self.temporal):
            least = "at least 1" if self.temporal else "1, as it has no frames"
            raise UserError(
                f"data.steps_per_frame is {self.steps_per_frame}, but for {self.name} must be {least}: set it so"
            )
        if self.classes and len(self.classes) != self.num_classes:
            raise UserError(
                f"{self.name} has {self.num_classes} classes and {len(self.classes)} names: give each class one, or "
                "none"
            )


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
    """What a reader hands over: the splits, whole.

    Attributes:
        train_images: uint8 [N, ...].
        train_labels: int32 [N].
        test_images: uint8 [M, ...].
        test_labels: int32 [M].
        validation_images: uint8 [K, ...], of a set that comes with a validation split; else None.
        validation_labels: int32 [K], or None.
    """

    train_images: Examples
    train_labels: np.ndarray
    test_images: Examples
    test_labels: np.ndarray
    validation_images: Examples | None = None
    validation_labels: np.ndarray | None = None


def permutation(seed: int, number: int, size: int) -> np.ndarray:
    """A permutation that depends on its arguments and on nothing else.

    Philox is a counter-based generator: keyed by (seed, number), it needs no state to be kept or restored. The raw
    numbers are sorted, rather than `Generator.permutation` be called, as NumPy promises the same raw numbers in every
    version but not the same permutation, and a run resumed after an upgrade must go on in the same order.

    Args:
        seed: The seed of the run or of the split, non-negative.
        number: Which of the seed's permutations, e.g. the epoch.
        size: How many elements.

    Returns:
        int64 [size].
    """
    if seed < 0:
        raise UserError(f"a seed must be 0 or more, not {seed}: set seed and data.split_seed to 0 or more")
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, number], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def hold_out(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `count` examples, each class in proportion to its size.

    Args:
        labels: int [N], the classes.
        count: How many examples to hold out, 0 to N - 1.
        seed: The split is a function of the labels, the count and this.

    Returns:
        (kept, held out), sorted int64 indices.

    Raises:
        UserError: If `count` leaves nothing to train on, or is negative.
    """
    size = len(labels)
    if not 0 <= count < size:
        raise UserError(
            f"data.num_validation is {count}, but must be 0 to {size - 1}, as the train split has {size}: set it "
            "lower, or to 0 and data.validation_share to 0.15, say"
        )
    order = permutation(seed, 0, size)
    place = np.empty(size)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)  # evenly spread, so every prefix is balanced
    chosen = np.zeros(size, bool)
    chosen[order[np.argsort(place[order], kind="stable")][:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def checksum(loaded: Loaded) -> str:
    """SHA-256 over shapes and contents of all arrays."""
    digest = hashlib.sha256()
    for array in loaded:
        if array is not None:
            whole = np.ascontiguousarray(array[:])
            digest.update(f"{whole.shape}{whole.dtype}".encode())
            digest.update(whole.data)
    return digest.hexdigest()


def store(allocate: Any, loaded: Loaded) -> str:
    """Puts all arrays into the cache (`mpisjax.data.cache.fetch` says what `allocate` is); gives their checksum."""
    for name, array in loaded._asdict().items():
        if array is not None:
            allocate(name, array.shape, array.dtype).append(np.asarray(array))
    return checksum(loaded)


class HoldOut(NamedTuple):
    """How much of the train split is held out for validation.

    Attributes:
        examples: How many, or 0.
        share: Share of the train split, in [0, 1); counts only where `examples` is 0.
        seed: Chooses them.
    """

    examples: int = 0
    share: float = 0.0
    seed: int = 0


def assemble(
    name: str,
    loaded: Loaded,
    num_classes: int,
    *,
    source: str,
    digest: str,
    validation: HoldOut,
    classes: tuple[str, ...] = (),
) -> DataSet:
    """Holds out validation and measures the train pixels; frames that are on disk stay there.

    Args:
        name: The set's name.
        loaded: What was read.
        num_classes: The number of classes.
        source: One sentence: where the data came from.
        digest: What `checksum` gave.
        validation: What to hold out; nothing may be where the set has a validation split of its own.
        classes: The classes' names, if they have any.

    Raises:
        UserError: If nothing would be left to train on, or two validation splits are asked for.
    """
    if loaded.validation_images is None or loaded.validation_labels is None:
        count = validation.examples or round(validation.share * len(loaded.train_labels))
        kept, held = hold_out(loaded.train_labels, count, validation.seed)
        train = Split(_take(loaded.train_images, kept), loaded.train_labels[kept])
        held_out = Split(_take(loaded.train_images, held), loaded.train_labels[held])
    elif validation.examples or validation.share:
        raise UserError(
            f"{name} has a validation split of its own: set data.num_validation and data.validation_share to 0"
        )
    else:
        train = Split(_take(loaded.train_images, slice(None)), loaded.train_labels)
        held_out = Split(_take(loaded.validation_images, slice(None)), loaded.validation_labels)
    temporal = len(train.images.shape) == 5
    channels = train.images.shape[-1]
    mean, std = ((0.0,) * channels, (1 / 255,) * channels) if temporal else statistics(train.images[:])
    return DataSet(
        name=name,
        num_classes=num_classes,
        train=train,
        validation=held_out,
        test=Split(_take(loaded.test_images, slice(None)), loaded.test_labels),
        mean=mean,
        std=std,
        temporal=temporal,
        source=source,
        checksum=digest,
        classes=classes,
    )


def _take(images: Any, rows: Any) -> Examples:
    """Some examples: arrays in memory, also where the cache maps them from disk; frames as they are."""
    if not isinstance(images, np.ndarray):
        return images.take(rows)
    taken = np.asarray(images)[rows]  # of indices that is a copy, of a slice it is none
    return taken.copy() if isinstance(rows, slice) else taken


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255 per channel, exactly: from the counts of the 256 values."""
    means, deviations = [], []
    value = np.arange(256) / 255
    for channel in range(images.shape[-1]):
        # Some images at a time: `bincount` makes eight bytes of each pixel.
        parts = (images[start : start + 1000, ..., channel] for start in range(0, len(images), 1000))
        count = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0)
        mean = float(count @ value / count.sum())
        means.append(mean)
        deviations.append(max(float(count @ (value - mean) ** 2 / count.sum()) ** 0.5, 1 / 255))
    return tuple(means), tuple(deviations)


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """How many examples each class has."""
    return np.bincount(labels, minlength=num_classes).tolist()


def summary(dataset: DataSet) -> dict[str, Any]:
    """What a run's log says of its data: source, checksum, and the class counts of the three splits."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        "name": dataset.name,
        "source": dataset.source,
        "checksum": dataset.checksum,
        "class_counts": {name: class_counts(split.labels, dataset.num_classes) for name, split in splits.items()},
    }
