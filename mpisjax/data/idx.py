"""The IDX format of MNIST and Fashion-MNIST.

Layout (Y. LeCun's MNIST page): two zero bytes, a type byte (8 is uint8), the number of dimensions, each dimension as a
big-endian 32-bit number, then the elements, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpisjax.data.types import Loaded
from mpisjax.errors import UserError

SIZE = 28
NUM_CLASSES = 10
MAX_BYTES = 1 << 30  # of elements; MNIST has 47 MB, so more is a broken or hostile header
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def parse(stream: BinaryIO, ndim: int, name: str) -> np.ndarray:
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
        raise UserError(
            f"{name} is no IDX file of bytes in {ndim} dimensions: it begins with {header[:4].hex()}"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", ndim, 4))
    size = math.prod(shape)
    # NumPy has a limit of its own, also where a length of zero leaves nothing of huge others.
    if math.prod(length for length in shape if length) > MAX_BYTES:
        raise UserError(f"{name} declares {shape} elements, more than the {MAX_BYTES} that are accepted")
    body = stream.read(size)
    if len(body) < size:
        raise UserError(
            f"{name} is truncated: {len(body)} of {size} elements are there; fetch the file again"
        )
    if stream.read(1):
        raise UserError(f"{name} goes on after the {size} elements that it declares: fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read(path: Path, ndim: int) -> np.ndarray:
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
                return parse(raw, ndim, str(path))
            with gzip.GzipFile(fileobj=raw) as stream:
                return parse(stream, ndim, str(path))  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def find(folder: Path) -> dict[str, Path] | None:
    """The four files in a folder, gzipped or plain, also under the names some archives have (`-` as `.`).

    Returns:
        Paths by split, or None where any is missing.
    """
    found = {}
    for key, stem in FILES.items():
        for name in (stem + ".gz", stem, stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"):
            if (folder / name).is_file():
                found[key] = folder / name
                break
        else:
            return None
    return found


def load(paths: dict[str, Path]) -> Loaded:
    """Reads and checks both splits.

    Args:
        paths: The four files, by the keys of `FILES`.

    Returns:
        uint8 [N, 28, 28, 1] images and int32 labels.

    Raises:
        UserError: For a damaged file, images of another size, labels out of range, an empty split, or numbers of
            images and labels that differ.
    """
    arrays = {}
    for split in ("train", "test"):
        images = read(paths[f"{split}_images"], 3)
        labels = read(paths[f"{split}_labels"], 1)
        where = paths[f"{split}_images"]
        if images.shape[1:] != (SIZE, SIZE):
            raise UserError(f"{where} holds images of {images.shape[1:]}, but {SIZE} x {SIZE} is wanted")
        if not len(images):
            raise UserError(f"{where} holds no image: fetch the file again")
        if len(images) != len(labels):
            raise UserError(
                f"{where} holds {len(images)} images, but {paths[f'{split}_labels']} {len(labels)} labels"
            )
        if labels.max() >= NUM_CLASSES:
            raise UserError(f"{paths[f'{split}_labels']} holds a label {labels.max()}, but 0 to 9 are wanted")
        arrays[f"{split}_images"] = images[..., None]
        arrays[f"{split}_labels"] = labels.astype(np.int32)
    return Loaded(**arrays)
