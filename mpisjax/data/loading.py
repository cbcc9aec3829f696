"""From a configuration to a data set."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mpisjax.data import cache, digits, event_sets, sources
from mpisjax.data.frames import Frames
from mpisjax.data.recordings import EVENT_SETS
from mpisjax.data.splits import class_counts, hold_out
from mpisjax.data.types import DataSet, Loaded, Split
from mpisjax.errors import UserError

NAMES = ("digits", *sources.IMAGE_SETS, *EVENT_SETS, "saccade_digits")


def load(config: Any) -> DataSet:
    """Loads a data set.

    Args:
        config: The `data` part of a configuration.

    Returns:
        The data set.

    Raises:
        UserError: If a setting is wrong, or the data is missing or damaged.
    """
    if config.name not in NAMES:
        raise UserError(f"data.name is {config.name!r}, but must be one of {', '.join(NAMES)}")
    if config.name in ("digits", *sources.IMAGE_SETS) and (config.crop or config.denoise_us):
        raise UserError(f"data.crop and data.denoise_us are for event sets: set both to 0 for {config.name}")
    if config.name == "digits":
        loaded = digits.load()
        return assemble(config, loaded, digits.NUM_CLASSES, digits.SENTENCE, checksum(loaded))
    if config.name == "saccade_digits":
        return assemble_events(config, digits.NUM_CLASSES, *event_sets.load_saccade_digits(config))
    if config.name in EVENT_SETS:
        found, where = sources.find_recordings(config)
        return assemble_events(
            config, EVENT_SETS[config.name].num_classes, *event_sets.load_recordings(config, found, where)
        )
    return _load_images(config)


def _load_images(config: Any) -> DataSet:
    source = sources.find(config)
    known = sources.IMAGE_SETS[config.name]

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        loaded = source.read()
        for name, array in zip(Loaded._fields, loaded, strict=True):
            allocate(name, array.shape, array.dtype).append(np.asarray(array))
        return {"checksum": checksum(loaded)}

    entry = cache.fetch(config.cache_dir, config.name, {"fingerprint": source.fingerprint}, build)
    loaded = Loaded(**entry.arrays)
    sentence = f"{config.name}, {source.sentence}, {completeness(loaded, known.num_train, known.num_test)}"
    if entry.note:
        sentence += f"; {entry.note}"
    return assemble(config, loaded, known.num_classes, sentence, entry.facts["checksum"])


def completeness(loaded: Loaded, num_train: int, num_test: int) -> str:
    """Says how many examples there are, and whether these are all."""
    have = f"{len(loaded.train_labels):,} train and {len(loaded.test_labels):,} test"
    if (len(loaded.train_labels), len(loaded.test_labels)) == (num_train, num_test):
        return f"complete: {have}"
    return f"a SUBSET: {have} of {num_train:,} and {num_test:,}"


def checksum(loaded: Loaded) -> str:
    """SHA-256 over shapes and contents of all four arrays."""
    digest = hashlib.sha256()
    for array in loaded:
        whole = np.ascontiguousarray(array[:])
        digest.update(f"{whole.shape}{whole.dtype}".encode())
        digest.update(whole.data)
    return digest.hexdigest()


def assemble(config: Any, loaded: Loaded, num_classes: int, source: str, digest: str) -> DataSet:
    """Holds out validation and measures the train pixels."""
    kept, held = hold_out(loaded.train_labels, config.num_validation, config.split_seed)
    train = Split(np.asarray(loaded.train_images[kept]), np.asarray(loaded.train_labels[kept]))
    mean, std = statistics(np.asarray(train.images))
    return DataSet(
        name=config.name,
        num_classes=num_classes,
        train=train,
        validation=Split(np.asarray(loaded.train_images[held]), np.asarray(loaded.train_labels[held])),
        test=Split(np.array(loaded.test_images[:]), np.array(loaded.test_labels)),
        mean=mean,
        std=std,
        temporal=False,
        source=source,
        checksum=digest,
    )


def assemble_events(config: Any, num_classes: int, loaded: Loaded, source: str, digest: str) -> DataSet:
    """Holds out validation, leaving frames where they are."""
    kept, held = hold_out(loaded.train_labels, config.num_validation, config.split_seed)
    assert isinstance(loaded.train_images, Frames)
    return DataSet(
        name=config.name,
        num_classes=num_classes,
        train=Split(loaded.train_images.take(kept), loaded.train_labels[kept]),
        validation=Split(loaded.train_images.take(held), loaded.train_labels[held]),
        test=Split(loaded.test_images, loaded.test_labels),
        mean=(0.0, 0.0),
        std=(1 / 255, 1 / 255),
        temporal=True,
        source=source,
        checksum=digest,
    )


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255 per channel, exactly: from the counts of the 256 values."""
    means, deviations = [], []
    value = np.arange(256) / 255
    for channel in range(images.shape[-1]):
        count = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = float(count @ value / count.sum())
        means.append(mean)
        deviations.append(max(float(count @ (value - mean) ** 2 / count.sum()) ** 0.5, 1 / 255))
    return tuple(means), tuple(deviations)


def summary(dataset: DataSet) -> dict[str, Any]:
    """What a run's log says of its data: source, checksum, and the class counts of the three splits."""
    counts = {
        name: class_counts(getattr(dataset, name).labels, dataset.num_classes)
        for name in ("train", "validation", "test")
    }
    return {
        "name": dataset.name,
        "source": dataset.source,
        "checksum": dataset.checksum,
        "class_counts": counts,
    }
