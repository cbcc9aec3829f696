"""Data that TFDS has prepared, read without TensorFlow.

`tfds.data_source` reads the random-access formats (array_record, parquet) by itself. Most people's data is in TFDS's
default, TFRECORD, for which TFDS wants TensorFlow; but the file is a plain list of records, so it is read here, and
TFDS decodes the records either way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpisjax.data.dataset import Loaded
from mpisjax.errors import UserError
from mpisjax.paths import expand

CHUNK = 1000  # examples read at a time


def find(name: str, folder: str) -> Path | None:
    """Looks for a prepared data set, without importing TFDS.

    Args:
        name: The set's name, in TFDS and here.
        folder: The TFDS data folder to look in; empty for `TFDS_DATA_DIR`, then `~/tensorflow_datasets`.

    Returns:
        The folder of the newest version prepared, or None.
    """
    for base in (folder,) if folder else (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets"):
        if not base:
            continue
        versions = [path.parent for path in Path(expand(base)).glob(f"{name}/*/dataset_info.json")]
        versions = [path for path in versions if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
        if versions:
            return max(versions, key=lambda path: tuple(int(part) for part in path.name.split(".")))
    return None


def fingerprint(place: Path) -> str:
    """Changes when the prepared files do: SHA-256 of their names, sizes and times, and of `dataset_info.json`."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(place.iterdir())]
    text = json.dumps(files) + (place / "dataset_info.json").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def import_tfds(what: str) -> Any:
    """TFDS, when it is needed: it is slow to import.

    Raises:
        UserError: If it is not installed; says what needs it.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"{what} needs TFDS ({error}): pip install tensorflow-datasets importlib_resources") from error
    return tensorflow_datasets


def load(place: Path, size: tuple[int, int, int], num_classes: int) -> Loaded:
    """Reads both splits, in the order in which TFDS stores them (not the official one).

    Args:
        place: The folder of a prepared version.
        size: The size that images must have, (H, W, C).
        num_classes: Labels must be below it.

    Returns:
        uint8 [N, H, W, C] images and int32 labels.

    Raises:
        UserError: If TFDS is not installed, or what was prepared is damaged or of another kind.
    """
    tfds = import_tfds(f"reading {place}")
    try:
        builder = tfds.builder_from_directory(place)
        splits = [_read_split(builder, place, split, size, num_classes) for split in ("train", "test")]
    except UserError:
        raise
    except Exception as error:  # TFDS raises what it likes for a damaged folder
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{place} cannot be read by TFDS ({why}): update TFDS or prepare it again") from error
    return Loaded(*splits[0], *splits[1])


def _read_split(
    builder: Any, place: Path, split: str, size: tuple[int, int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    if split not in builder.info.splits:
        raise UserError(f"{place} has no {split} split: prepare it again")
    count = builder.info.splits[split].num_examples
    images, labels = np.empty((count, *size), np.uint8), np.empty(count, np.int64)
    row = 0
    for example in _examples(builder, split):
        image = example["image"]
        if row == count or image.shape != size or image.dtype != np.uint8:
            raise UserError(f"{place} holds other images than {count} of {size} bytes in {split}: prepare it again")
        images[row], labels[row] = image, example["label"]
        row += 1
    if row != count or not count:
        raise UserError(f"{place} holds {row} of {count} {split} examples: prepare it again")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{place} holds a label outside of 0 to {num_classes - 1}: prepare it again")
    return images, labels.astype(np.int32)


def _examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if formats & {"array_record", "parquet"}:
        source = builder.as_data_source(split=split)
        for start in range(0, len(source), CHUNK):
            yield from source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))
    elif "tfrecord" in formats:
        for path in builder.info.splits[split].filepaths:
            for record in tfrecords(Path(path).read_bytes(), str(path)):
                yield builder.info.features.deserialize_example_np(record)
    else:
        raise UserError(f"{builder.data_dir} is prepared as {', '.join(formats)}: prepare it as array_record")


def tfrecords(content: bytes, name: str) -> list[bytes]:
    """The records of a TFRECORD file.

    Each is its length (uint64), a masked CRC-32C of the length, the bytes, and a masked CRC-32C of the bytes, all
    little-endian (TensorFlow, `tfrecord.rst`).

    Args:
        content: The file.
        name: What to call it in an error.

    Returns:
        The records' bytes.

    Raises:
        UserError: If it is truncated or a checksum is wrong.
    """
    records, sums, lengths, position = [], [], [], 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        end = position + 12 + length
        if end + 4 > len(content):
            raise UserError(f"{name} is truncated: prepare it again")
        lengths.append(content[position : position + 8])
        records.append(content[position + 12 : end])
        sums.append((content[position + 8 : position + 12], content[end : end + 4]))
        position = end + 4
    for parts, place in ((lengths, 0), (records, 1)):
        wanted = [int.from_bytes(pair[place], "little") for pair in sums]
        if not np.array_equal(masked_crc32c(parts), np.array(wanted, np.uint32)):
            raise UserError(f"{name} is damaged, a checksum is wrong: prepare it again")
    return records


def masked_crc32c(parts: list[bytes]) -> np.ndarray:
    """The masked CRC-32C of each part, uint32 [N]; a byte of all parts at a time, as a loop over all would be slow."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    sizes = np.array([len(part) for part in parts], np.int64)
    order = np.argsort(-sizes, kind="stable")
    crc = np.full(len(parts), 0xFFFFFFFF, np.uint32)
    joined = np.frombuffer(b"".join(parts), np.uint8)
    starts = (np.cumsum(sizes) - sizes)[order]
    active = len(parts)
    for place in range(int(sizes.max(initial=0))):
        while sizes[order[active - 1]] <= place:
            active -= 1
        value = crc[:active]
        crc[:active] = table[(value ^ joined[starts[:active] + place]) & 0xFF] ^ (value >> 8)
    result = np.empty_like(crc)
    result[order] = ~crc
    return ((result >> 15) | (result << np.uint32(17))) + np.uint32(0xA282EAD8)
