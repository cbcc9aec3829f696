"""Small files in the formats of the data sets, and the `data` part of a configuration."""

import gzip
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict


def settings(**changes) -> ConfigDict:
    """The `data` part of a configuration."""
    config = dict(
        name="digits", dir="", cache_dir="", source="auto", num_validation=100, split_seed=0, crop=0, num_frames=10,
        frames="count", binning="time", denoise_us=0.0, augment=dict(flip=False, shift=0, cutout=0, mixup=0.0),
    )  # fmt: skip
    return ConfigDict(config | changes)


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, rng: np.random.Generator, num_train: int, num_test: int) -> dict:
    """The four gzipped files of MNIST with random content; returns the arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, stem, size in (("train", "train", num_train), ("test", "t10k", num_test)):
        images = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images), 1))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels), 1))
        arrays[split] = (images, labels)
    return arrays
