"""The files of MNIST, Fashion-MNIST and CIFAR: IDX, and CIFAR's binary and python versions.

IDX (Y. LeCun's MNIST page): two zero bytes, a type byte (8 is uint8), the number of dimensions, each dimension as a
big-endian 32-bit number, then the elements, last dimension fastest.

CIFAR (A. Krizhevsky, 2009), binary: records of the label (CIFAR-100: the coarse, then the fine label), then 3,072 bytes
of red, green and blue planes, rows first. Python: pickled dictionaries of the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

import numpy as np

from mpisjax.data import pickles
from mpisjax.data.dataset import Loaded
from mpisjax.errors import UserError

PADDING = 1 << 20  # more than a tar archive has at its end
MAX_BYTES = 512 << 20  # of a file, unzipped; the CIFAR archives have 185 MB, so more is no such set
IDX_SIZE = 28
IDX_CLASSES = 10
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


class Found(NamedTuple):
    """Where a set was found.

    Attributes:
        folder: The folder.
        fingerprint: Gives a text that changes when the content may have.
        read: Reads and checks it.
    """

    folder: Path
    fingerprint: Callable[[], str]
    read: Callable[[], Loaded]


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' SHA-256s."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read, unzipped where it is gzipped (told by its first bytes, not by its name).

    Raises:
        UserError: It cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_file(path: Path) -> bytes:
    """A whole file, unzipped.

    Raises:
        UserError: It cannot be read, is damaged, or is larger than `MAX_BYTES`.
    """
    with opened(path) as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _too_large(path)
    return content


def _too_large(path: Path) -> UserError:
    return UserError(f"{path} has more than {MAX_BYTES >> 20} MiB, which is no such data set")


def parse_idx(stream: BinaryIO, ndim: int, name: str) -> np.ndarray:
    """Reads an IDX array of bytes, and no more than it declares.

    Args:
        stream: The file.
        ndim: The number of dimensions the array must have.
        name: What to call the file in an error.

    Returns:
        uint8 array of `ndim` dimensions, none of them empty.

    Raises:
        UserError: If it is not such an array, is too short or too long, or declares more than `MAX_BYTES`.
    """
    header = stream.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim:
        raise UserError(f"{name} is truncated within its header: fetch the file again")
    if header[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(f"{name} is no IDX file of bytes in {ndim} dimensions: it begins with {header[:4].hex()}")
    shape = tuple(np.frombuffer(header, ">u4", ndim, 4).tolist())
    size = math.prod(shape)
    if not size:
        raise UserError(f"{name} holds nothing, it declares {shape} elements: fetch the file again")
    if size > MAX_BYTES:
        raise UserError(f"{name} declares {shape} elements, more than the {MAX_BYTES} that are accepted")
    body = stream.read(size)
    if len(body) < size:
        raise UserError(f"{name} is truncated: {len(body)} of {size} elements are there; fetch the file again")
    if stream.read(1):
        raise UserError(f"{name} goes on after the {size} elements that it declares: fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def find_idx(folder: Path) -> Found | None:
    """The four files in a folder, gzipped or plain, also under the names some archives have (`-` as `.`)."""
    paths = {}
    for key, stem in IDX_FILES.items():
        dotted = stem.replace("-idx", ".idx")
        there = [folder / name for name in (stem + ".gz", stem, dotted, dotted + ".gz") if (folder / name).is_file()]
        if not there:
            return None
        paths[key] = there[0]
    return Found(folder, partial(fingerprint, paths.values()), partial(load_idx, paths))


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
        where, labelled = paths[f"{split}_images"], paths[f"{split}_labels"]
        with opened(where) as stream:
            images = parse_idx(stream, 3, str(where))
        with opened(labelled) as stream:
            labels = parse_idx(stream, 1, str(labelled))
        if images.shape[1:] != (IDX_SIZE, IDX_SIZE):
            raise UserError(f"{where} holds images of {images.shape[1:]}, but {IDX_SIZE} x {IDX_SIZE} is wanted")
        if len(images) != len(labels):
            raise UserError(f"{where} holds {len(images)} images, but {labelled} {len(labels)} labels")
        if labels.max() >= IDX_CLASSES:
            raise UserError(f"{labelled} holds a label {labels.max()}, but 0 to 9 are wanted")
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


def find_cifar(name: str, folder: Path) -> Found | None:
    """An archive, else its extracted files, in a folder or in the folder they are packed in: a test file and at least
    one train file.
    """
    for layout in CIFAR_LAYOUTS[name]:
        if (folder / layout.archive).is_file():
            paths: tuple[Path, ...] = (folder / layout.archive,)
            return Found(folder, partial(fingerprint, paths), partial(load_cifar, paths, layout))
        for place in (folder / layout.folder, folder):
            train = [place / name for name in layout.train if (place / name).is_file()]
            if train and (place / layout.test).is_file():
                paths = (*train, place / layout.test)
                return Found(folder, partial(fingerprint, paths), partial(load_cifar, paths, layout))
    return None


def load_cifar(paths: tuple[Path, ...], layout: Layout) -> Loaded:
    """Reads and checks both splits.

    Args:
        paths: The archive alone, or the files of a folder, that of the test split last.
        layout: How the set is stored there.

    Returns:
        uint8 [N, 32, 32, 3] images and int32 labels.

    Raises:
        UserError: For a damaged archive or file, an incomplete record, a label out of range, or an empty split.
    """
    if paths[0].name == layout.archive:
        members = [f"{layout.folder}/{name}" for name in (*layout.train, layout.test)]
        read = read_members(paths[0], members)
        for member in (members[0], members[-1]):
            if member not in read:
                raise UserError(f"{paths[0]} holds no file {member}: fetch the archive again")
        content = {f"{paths[0]}: {member}": read[member] for member in members if member in read}
    else:
        content = {str(path): read_file(path) for path in paths}
    parse = parse_cifar_binary if layout.label_bytes else parse_cifar_python
    *train, test = (parse(part, name, layout) for name, part in content.items())
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Loaded(images, labels, *test)


def read_members(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Reads regular files out of a tar archive, gzipped or plain, into memory: nothing is written to disk.

    Args:
        path: The archive.
        wanted: The names of the members to keep, e.g. "cifar-10-batches-bin/test_batch.bin".

    Returns:
        The contents by name; a wanted member that is not there is left out.

    Raises:
        UserError: If the archive is truncated, damaged or too large, or a wanted member is no regular file.
    """
    found: dict[str, bytes] = {}
    try:
        # Read as a stream: nothing can make it seek backwards, so no header can make it go in circles.
        with opened(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if member.offset_data + member.size > MAX_BYTES:
                        raise _too_large(path)
                    if member.name in wanted:
                        if not member.isreg():
                            raise UserError(f"{path}: {member.name} is no regular file: fetch the archive again")
                        found[member.name] = cast(IO[bytes], archive.extractfile(member)).read()
            if len(stream.read(PADDING)) == PADDING:  # gzip checks its sum at the end
                raise UserError(f"{path} goes on after its last member: fetch the archive again")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): fetch the archive again") from error
    return found


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
    return _checked(pixels, np.array(labels), name, layout)


def _checked(pixels: np.ndarray, labels: np.ndarray, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    outside = labels[(labels < 0) | (labels >= layout.num_classes)]
    if len(outside):
        raise UserError(f"{name} holds a label {outside[0]}, but 0 to {layout.num_classes - 1} are wanted")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int32)
