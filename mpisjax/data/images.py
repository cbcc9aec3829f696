"""The files of MNIST, Fashion-MNIST and CIFAR: IDX, and CIFAR's binary and python versions.

IDX (Y. LeCun's MNIST page): two zero bytes, a type byte (8 is uint8), the number of dimensions, each dimension as a
big-endian 32-bit number, then the elements, last dimension fastest.

CIFAR (A. Krizhevsky, 2009), binary: records of the label (CIFAR-100: the coarse, then the fine label), then 3,072 bytes
of red, green and blue planes, rows first. Python: pickled dictionaries of the same bytes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mpisjax.data import fetch, pickles
from mpisjax.data.dataset import Loaded
from mpisjax.errors import UserError

IDX_SIZE = 28
IDX_CLASSES = 10
MAX_IDX_BYTES = 1 << 30  # of elements; MNIST has 47 MB, so more is a broken or hostile header
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def parse_idx(stream: BinaryIO, ndim: int, name: str) -> np.ndarray:
    """Reads an IDX array of bytes.

    Args:
        stream: The (decompressed) bytes. Never read beyond what the header declares, plus one byte.
        ndim: The number of dimensions the array must have.
        name: What to call the file in an error.

    Returns:
        uint8 array of `ndim` dimensions.

    Raises:
        UserError: If it is not such an array, or is too short, too long or too large.
    """
    header = stream.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim:
        raise UserError(f"{name} is truncated within its header: fetch the file again")
    if header[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(f"{name} is no IDX file of bytes in {ndim} dimensions: it begins with {header[:4].hex()}")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", ndim, 4))
    size = math.prod(shape)
    # NumPy has a limit of its own, also where a length of zero leaves nothing of huge others.
    if math.prod(length for length in shape if length) > MAX_IDX_BYTES:
        raise UserError(f"{name} declares {shape} elements, more than the {MAX_IDX_BYTES} that are accepted")
    body = stream.read(size)
    if len(body) < size:
        raise UserError(f"{name} is truncated: {len(body)} of {size} elements are there; fetch the file again")
    if stream.read(1):
        raise UserError(f"{name} goes on after the {size} elements that it declares: fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file, plain or gzipped (told by its first bytes, not by its name).

    Args:
        path: The file.
        ndim: The number of dimensions its array must have.

    Returns:
        uint8 array of `ndim` dimensions.

    Raises:
        UserError: If it cannot be read or is not such a file.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return parse_idx(raw, ndim, str(path))
            with gzip.GzipFile(fileobj=raw) as stream:
                return parse_idx(stream, ndim, str(path))  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def find_idx(folder: Path) -> dict[str, Path] | None:
    """The four files in a folder, gzipped or plain, also under the names some archives have (`-` as `.`).

    Returns:
        Paths by split, or None where any is missing.
    """
    found = {}
    for key, stem in IDX_FILES.items():
        for name in (stem + ".gz", stem, stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"):
            if (folder / name).is_file():
                found[key] = folder / name
                break
        else:
            return None
    return found


def load_idx(paths: dict[str, Path]) -> Loaded:
    """Reads and checks both splits.

    Args:
        paths: The four files, by the keys of `IDX_FILES`.

    Returns:
        uint8 [N, 28, 28, 1] images and int32 labels.

    Raises:
        UserError: For a damaged file, images of another size, labels out of range, an empty split, or numbers of
            images and labels that differ.
    """
    arrays = {}
    for split in ("train", "test"):
        images = read_idx(paths[f"{split}_images"], 3)
        labels = read_idx(paths[f"{split}_labels"], 1)
        where = paths[f"{split}_images"]
        if images.shape[1:] != (IDX_SIZE, IDX_SIZE):
            raise UserError(f"{where} holds images of {images.shape[1:]}, but {IDX_SIZE} x {IDX_SIZE} is wanted")
        if not len(images):
            raise UserError(f"{where} holds no image: fetch the file again")
        if len(images) != len(labels):
            raise UserError(f"{where} holds {len(images)} images, but {paths[f'{split}_labels']} {len(labels)} labels")
        if labels.max() >= IDX_CLASSES:
            raise UserError(f"{paths[f'{split}_labels']} holds a label {labels.max()}, but 0 to 9 are wanted")
        arrays[f"{split}_images"] = images[..., None]
        arrays[f"{split}_labels"] = labels.astype(np.int32)
    return Loaded(**arrays)


CIFAR_PIXELS = 3 * 32 * 32


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
CIFAR_LAYOUTS = {
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


class CifarFiles(NamedTuple):
    """Where a set was found.

    Attributes:
        layout: How it is stored there.
        paths: The archive alone, or the files of a folder.
    """

    layout: Layout
    paths: tuple[Path, ...]


def find_cifar(name: str, folder: Path) -> CifarFiles | None:
    """Looks for an archive, else for its extracted files, in a folder or in the folder they are packed in.

    Returns:
        What was found: an archive, or a test file with at least one train file; None otherwise.
    """
    for layout in CIFAR_LAYOUTS[name]:
        if (folder / layout.archive).is_file():
            return CifarFiles(layout, (folder / layout.archive,))
        for place in (folder / layout.folder, folder):
            train = [place / name for name in layout.train if (place / name).is_file()]
            if train and (place / layout.test).is_file():
                return CifarFiles(layout, (*train, place / layout.test))
    return None


def load_cifar(found: CifarFiles) -> Loaded:
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
        content = {name.rpartition("/")[2]: data for name, data in fetch.read_members(archive, wanted).items()}
        where = {name: f"{archive}: {name}" for name in content}
        for name in (layout.train[0], layout.test):
            if name not in content:
                raise UserError(f"{archive} holds no {layout.folder}/{name}: fetch the archive again")
    parse: Callable[[bytes, str, Layout], tuple[np.ndarray, np.ndarray]]
    parse = parse_cifar_binary if layout.label_bytes else parse_cifar_python
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


def parse_cifar_binary(content: bytes, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Records of the binary version to images uint8 [N, 32, 32, 3] and labels int32 [N].

    Raises:
        UserError: If there is no record, an incomplete one, or a label out of range.
    """
    size = layout.label_bytes + CIFAR_PIXELS
    if not content or len(content) % size:
        raise UserError(f"{name} has {len(content)} bytes, not a multiple of {size}: fetch the file again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _checked(records[:, layout.label_bytes :], records[:, layout.label_bytes - 1], name, layout)


def parse_cifar_python(content: bytes, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """A pickled batch of the python version to images uint8 [N, 32, 32, 3] and labels int32 [N].

    Raises:
        UserError: If it is no such pickle, is empty, or holds a label out of range.
    """
    batch = pickles.unpickle(content, name)
    pixels, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != CIFAR_PIXELS or not len(pixels):
        raise UserError(f"{name} has no 'data' of N x {CIFAR_PIXELS} bytes: fetch the file again")
    if not isinstance(labels, list) or not all(type(n) is int for n in labels) or len(labels) != len(pixels):
        raise UserError(f"{name} has no {layout.label_key!r} for its {len(pixels)} images: fetch the file again")
    if not 0 <= min(labels) <= max(labels) < layout.num_classes:
        raise UserError(f"{name} holds a label outside of 0 to {layout.num_classes - 1}: fetch the file again")
    return _checked(pixels, np.array(labels), name, layout)


def _checked(pixels: np.ndarray, labels: np.ndarray, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    if labels.max() >= layout.num_classes:
        raise UserError(f"{name} holds a label {labels.max()}, but 0 to {layout.num_classes - 1} are wanted")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int32)
