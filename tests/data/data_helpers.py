"""Small files in the formats of the data sets, and the `data` part of a configuration."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mpisjax.data import cifar


def settings(**changes) -> ConfigDict:
    """The `data` part of a configuration."""
    config = {
        "name": "digits",
        "dir": "",
        "cache_dir": "",
        "source": "auto",
        "num_validation": 100,
        "split_seed": 0,
        "crop": 0,
        "num_frames": 10,
        "frames": "count",
        "binning": "time",
        "denoise_us": 0.0,
        "augment": {"flip": False, "shift": 0, "cutout": 0, "mixup": 0.0},
    }
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


def cifar_records(rng: np.random.Generator, size: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random planes uint8 [size, 3072] and labels."""
    return rng.integers(0, 256, (size, 3072), np.uint8), (np.arange(size) % num_classes).astype(np.uint8)


def tar_bytes(members: list[tuple[str, bytes]], mode: str = "w:gz") -> bytes:
    """A tar archive of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_members(
    name: str, rng: np.random.Generator, size: int, version: str = "binary"
) -> tuple[list, dict]:
    """Members of an archive of CIFAR with `size` images a file, and the arrays it holds (planes, labels)."""
    layout = cifar.LAYOUTS[name][0 if version == "binary" else 1]
    members, arrays = [], {"train": [], "test": []}
    for file in (*layout.train, layout.test):
        pixels, labels = cifar_records(rng, size, layout.num_classes)
        arrays["test" if file == layout.test else "train"].append((pixels, labels))
        if version == "binary":
            coarse = labels[:, None] // 5
            columns = [labels[:, None], pixels] if name == "cifar10" else [coarse, labels[:, None], pixels]
            content = np.concatenate(columns, 1).tobytes()
        else:
            batch = {b"batch_label": b"batch", layout.label_key.encode(): labels.tolist(), b"data": pixels}
            content = pickle.dumps(batch, protocol=2)
        members.append((f"{layout.folder}/{file}", content))
    joined = {
        split: tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        for split, parts in arrays.items()
    }
    return members, joined


def images_of(planes: np.ndarray) -> np.ndarray:
    """Planes uint8 [N, 3072] as images [N, 32, 32, 3], by the obvious loop."""
    images = np.empty((len(planes), 32, 32, 3), np.uint8)
    for channel in range(3):
        images[..., channel] = planes[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
    return images
