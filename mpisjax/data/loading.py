"""From a configuration to a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mpisjax.data import digits, idx
from mpisjax.data.splits import class_counts, hold_out
from mpisjax.data.types import DataSet, Loaded, Split
from mpisjax.errors import UserError

STATIC = {"digits": 10, "mnist": 10, "fashion_mnist": 10}


def load(config: Any) -> DataSet:
    """Loads a data set.

    Args:
        config: The `data` part of a configuration.

    Returns:
        The data set.

    Raises:
        UserError: If a setting is wrong, or the data is missing or damaged.
    """
    if config.name not in STATIC:
        raise UserError(f"data.name is {config.name!r}, but must be one of {', '.join(STATIC)}")
    if config.name == "digits":
        loaded, source = digits.load(), "scikit-learn's digits, complete, split 80/20 by a fixed seed"
    else:
        paths = idx.find(Path(config.dir) / config.name) or idx.find(Path(config.dir))
        if paths is None:
            raise UserError(f"no {', '.join(idx.FILES.values())} (.gz or plain) in data.dir={config.dir!r}")
        loaded, source = idx.load(paths), f"IDX files in {next(iter(paths.values())).parent}"
    return assemble(config, loaded, source, checksum(loaded))


def checksum(loaded: Loaded) -> str:
    """SHA-256 over shapes and contents of all four arrays."""
    digest = hashlib.sha256()
    for array in loaded:
        whole = np.ascontiguousarray(array[:])
        digest.update(f"{whole.shape}{whole.dtype}".encode())
        digest.update(whole.data)
    return digest.hexdigest()


def assemble(config: Any, loaded: Loaded, source: str, digest: str) -> DataSet:
    """Holds out validation and measures the train pixels."""
    kept, held = hold_out(loaded.train_labels, config.num_validation, config.split_seed)
    train = Split(loaded.train_images[kept], loaded.train_labels[kept])
    mean, std = statistics(np.asarray(train.images))
    return DataSet(
        name=config.name,
        num_classes=STATIC[config.name],
        train=train,
        validation=Split(loaded.train_images[held], loaded.train_labels[held]),
        test=Split(loaded.test_images[:], loaded.test_labels),
        mean=mean,
        std=std,
        temporal=False,
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
