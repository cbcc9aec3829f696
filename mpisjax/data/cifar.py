"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009), from the binary or the python version.

Binary: records of the label (CIFAR-100: the coarse, then the fine label), then 3,072 bytes of red, green and blue
planes, rows first. Python: pickled dictionaries of the same bytes, which `unpickle` reads without running them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpisjax.data import fetch
from mpisjax.data.types import Loaded
from mpisjax.data.unpickle import unpickle
from mpisjax.errors import UserError

PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """How one version of one set is stored."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    num_classes: int
    label_bytes: int  # of a binary record; 0 is the python version
    label_key: str = ""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = {
    "cifar10": (
        Layout(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            10,
            1,
        ),
        Layout("cifar-10-python.tar.gz", "cifar-10-batches-py", _BATCHES, "test_batch", 10, 0, "labels"),
    ),
    "cifar100": (
        Layout("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", 100, 2),
        Layout("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", 100, 0, "fine_labels"),
    ),
}


class Found(NamedTuple):
    """Where a set was found.

    Attributes:
        layout: How it is stored there.
        paths: The archive alone, or the files of a folder.
    """

    layout: Layout
    paths: tuple[Path, ...]


def find(name: str, folder: Path) -> Found | None:
    """Looks for an archive, else for its extracted files, in a folder or in the folder they are packed in.

    Returns:
        What was found: an archive, or a test file with at least one train file; None otherwise.
    """
    for layout in LAYOUTS[name]:
        if (folder / layout.archive).is_file():
            return Found(layout, (folder / layout.archive,))
        for place in (folder / layout.folder, folder):
            train = [place / name for name in layout.train if (place / name).is_file()]
            if train and (place / layout.test).is_file():
                return Found(layout, (*train, place / layout.test))
    return None


def load(found: Found) -> Loaded:
    """Reads and checks both splits.

    Returns:
        uint8 [N, 32, 32, 3] images and int32 labels.

    Raises:
        UserError: For a damaged archive or file, an incomplete record, a label out of range, or an empty split.
    """
    layout = found.layout
    if found.paths[0].name in (*layout.train, layout.test):
        where = {path.name: str(path) for path in found.paths}
        content = {path.name: _read(path) for path in found.paths}
    else:
        archive = found.paths[0]
        wanted = [f"{layout.folder}/{name}" for name in (*layout.train, layout.test)]
        content = {
            name.rpartition("/")[2]: data for name, data in fetch.read_members(archive, wanted).items()
        }
        where = {name: f"{archive}: {name}" for name in content}
        for name in (layout.train[0], layout.test):
            if name not in content:
                raise UserError(f"{archive} holds no {layout.folder}/{name}: fetch the archive again")
    parse: Callable[[bytes, str, Layout], tuple[np.ndarray, np.ndarray]]
    parse = parse_binary if layout.label_bytes else parse_python
    train = [parse(content[name], where[name], layout) for name in layout.train if name in content]
    test_images, test_labels = parse(content[layout.test], where[layout.test], layout)
    return Loaded(
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        test_images,
        test_labels,
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > fetch.MAX_BYTES:
            raise UserError(f"{path} is larger than the {fetch.MAX_BYTES >> 20} MiB that are accepted")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_binary(content: bytes, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Records of the binary version to images uint8 [N, 32, 32, 3] and labels int32 [N].

    Raises:
        UserError: If there is no record, an incomplete one, or a label out of range.
    """
    size = layout.label_bytes + PIXELS
    if not content or len(content) % size:
        raise UserError(f"{name} has {len(content)} bytes, not a multiple of {size}: fetch the file again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _checked(records[:, layout.label_bytes :], records[:, layout.label_bytes - 1], name, layout)


def parse_python(content: bytes, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """A pickled batch of the python version to images uint8 [N, 32, 32, 3] and labels int32 [N].

    Raises:
        UserError: If it is no such pickle, is empty, or holds a label out of range.
    """
    batch = unpickle(content, name)
    pixels, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        raise UserError(f"{name} has no 'data' of N x {PIXELS} bytes: fetch the file again")
    if not isinstance(labels, list) or not all(type(n) is int for n in labels) or len(labels) != len(pixels):
        raise UserError(
            f"{name} has no {layout.label_key!r} for its {len(pixels)} images: fetch the file again"
        )
    if not 0 <= min(labels) <= max(labels) < layout.num_classes:
        raise UserError(
            f"{name} holds a label outside of 0 to {layout.num_classes - 1}: fetch the file again"
        )
    return _checked(pixels, np.array(labels), name, layout)


def _checked(
    pixels: np.ndarray, labels: np.ndarray, name: str, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    if labels.max() >= layout.num_classes:
        raise UserError(f"{name} holds a label {labels.max()}, but 0 to {layout.num_classes - 1} are wanted")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int32)
