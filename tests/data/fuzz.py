"""Feeds broken files to the readers and makes sure that each is read right or refused in one sentence.

    python tests/data/fuzz.py [INPUTS] [SEED]

tries so many inputs (100,000 by default), spread evenly over the readers, and prints how many were accepted and
refused, the slowest one and the peak of memory. Whatever else happens - another exception, an array that is not what it
should be - is printed with the input, and the exit code is 1.
"""

from __future__ import annotations

import gzip
import io
import pickle
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package may be this checkout

from data_helpers import (
    aedat2_bytes,
    aedat3_bytes,
    cifar_members,
    idx_bytes,
    nmnist_bytes,
    random_events,
    tar_bytes,
)

from mpisjax.data import arrays, folders, images, prepared
from mpisjax.data.events import readers
from mpisjax.data.pickles import unpickle
from mpisjax.errors import UserError

REFUSED = (UserError, readers.Invalid)


class Target(NamedTuple):
    """A reader: whole files to be broken, and how it is called; it asserts what it gives back."""

    seeds: list[bytes]
    read: Callable[[bytes], None]


def read_idx(content: bytes) -> None:
    array = images.parse_idx(io.BytesIO(content), 3, "file")
    assert array.dtype == np.uint8 and array.ndim == 3 and 0 < array.size < len(content)


def read_archive(content: bytes) -> None:
    layout = images.CIFAR_LAYOUTS["cifar10"][0]
    wanted = [f"{layout.folder}/{name}" for name in (*layout.train, layout.test)]
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as file:
        Path(file.name).write_bytes(content)
        members = images.read_members(Path(file.name), wanted)
    assert set(members) <= set(wanted)
    for name, member in members.items():
        check_images(*images.parse_cifar_binary(member, name, layout), 10)


def read_binary(content: bytes) -> None:
    check_images(*images.parse_cifar_binary(content, "batch", images.CIFAR_LAYOUTS["cifar100"][0]), 100)


def read_python(content: bytes) -> None:
    check_images(*images.parse_cifar_python(content, "batch", images.CIFAR_LAYOUTS["cifar10"][1]), 10)


def read_pickle(content: bytes) -> None:
    assert isinstance(unpickle(content, "pickle"), dict)


def read_tfrecords(content: bytes) -> None:
    assert all(isinstance(record, bytes) for record in prepared.tfrecords(content, "file"))


def check_images(images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3) and len(labels)
    assert labels.dtype == np.int32 and 0 <= labels.min() <= labels.max() < num_classes


def read_events(parse: Callable[[bytes], np.ndarray], size: int) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        got = readers.check(parse(content), size, size)
        assert got.dtype == readers.EVENT and len(got) and (np.diff(got["t"]) >= 0).all() and got["t"][0] >= 0
        assert set(np.unique(got["p"])) <= {0, 1}
        for name in ("x", "y"):
            assert got[name].min() >= 0 and got[name].max() < size

    return read


def read_image(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an image that claims to be huge, say
        try:
            pixels, _ = folders.read_image(io.BytesIO(content), image_size=16)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(str(error)) from error
    assert pixels.dtype == np.uint8 and pixels.shape in ((16, 16, 1), (16, 16, 3))


def read_npz(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        Path(file.name).write_bytes(content)
        dataset = arrays.from_file(file.name)
    assert dataset.train.images.dtype == np.uint8 and dataset.num_classes >= 2


def image_files() -> list[bytes]:
    """A small image in each format and a few modes."""
    rng, made = np.random.default_rng(1), []
    for ending, mode in (
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "L"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
    ):
        image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, ending)
        made.append(buffer.getvalue())
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (9, 7), np.uint16)).save(deep, "PNG")
    return [*made, deep.getvalue()]


def tfrecord(record: bytes) -> bytes:
    length = len(record).to_bytes(8, "little")
    sums = [int(prepared.masked_crc32c([part])[0]).to_bytes(4, "little") for part in (length, record)]
    return length + sums[0] + record + sums[1]


def targets() -> dict[str, Target]:
    """All readers, with small files to begin from."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 28, 28), np.uint8)
    members, _ = cifar_members("cifar10", rng, 1)
    tar = tar_bytes(members, "w")
    pixels = rng.integers(0, 256, (1, 3072), np.uint8)
    batches = [
        pickle.dumps({"data": pixels, "labels": [3], "n": [None, True, "a", b"b", 1 << 40]}, n) for n in range(5)
    ]
    large, small = random_events(rng, 40, 128, 128), random_events(rng, 40, 34, 34)
    rows = np.stack([large["x"], large["y"], large["p"], large["t"] // 1000], 1)
    saved = io.BytesIO()
    np.save(saved, rows)
    zipped, structured, own = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(zipped, rows=rows)
    np.save(structured, large)
    x, y = rng.integers(0, 256, (6, 4, 4), np.uint8), np.array(["a", "b"] * 3)
    np.savez(own, x_train=x, y_train=y, x_test=x, y_test=y)
    return {
        "IDX": Target([idx_bytes(images), idx_bytes(images[:, :3, :3])], read_idx),
        "CIFAR archive": Target([tar, tar_bytes(members, "w:gz"), gzip.compress(tar[:2048])], read_archive),
        "CIFAR binary": Target([bytes(2 * 3074), bytes([1, 99]) + pixels.tobytes()], read_binary),
        "CIFAR python": Target(batches, read_python),
        "pickle": Target([pickle.dumps({"a": [1, (2, 3)], "b": {"c": b"d"}}, n) for n in range(5)], read_pickle),
        "TFRECORD": Target([tfrecord(b"abc") + tfrecord(b"") + tfrecord(bytes(50))], read_tfrecords),
        "N-MNIST": Target([nmnist_bytes(small), bytes([0, 240, 0, 0, 0]) * 5], read_events(readers.parse_nmnist, 34)),
        "AEDAT 2": Target([aedat2_bytes(large)], read_events(readers.parse_aedat2, 128)),
        "AEDAT 3": Target([aedat3_bytes(large, 16)], read_events(readers.parse_aedat3, 128)),
        "event array": Target(
            [saved.getvalue(), zipped.getvalue(), structured.getvalue()], read_events(readers.parse_array, 128)
        ),
        "image": Target(image_files(), read_image),
        "own arrays": Target([own.getvalue()], read_npz),
    }


NUMBERS = [
    0,
    1,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Breaks a file in a few places; mostly near its beginning, where headers are."""
    broken = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        end = len(broken) if rng.random() < 0.5 else min(len(broken), 600)
        place = int(rng.integers(0, end + 1))
        kind = rng.integers(0, 8)
        if kind == 0 and place < len(broken):
            broken[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and place < len(broken):
            broken[place] = int(rng.integers(0, 256))
        elif kind == 2:
            del broken[place:]
        elif kind == 3:
            del broken[place : place + int(rng.integers(1, 40))]
        elif kind == 4:
            broken[place:place] = rng.bytes(int(rng.integers(1, 20)))
        elif kind == 5:
            width = int(rng.choice([1, 2, 4, 8]))
            number = NUMBERS[int(rng.integers(0, len(NUMBERS)))] & ((1 << 8 * width) - 1)
            broken[place : place + width] = number.to_bytes(width, "big" if rng.random() < 0.5 else "little")
        elif kind == 6:
            source = int(rng.integers(0, len(broken) + 1))
            broken[place:place] = broken[source : source + int(rng.integers(1, 200))]
        else:
            broken[place : place + 8] = b"%011o" % NUMBERS[int(rng.integers(0, 12))]
    return bytes(broken)


def attempt(read: Callable[[bytes], None], content: bytes) -> bool:
    """True if the reader took it, False if it was refused as it should be.

    Raises:
        AssertionError: If the refusal is not one line.
    """
    try:
        read(content)
    except REFUSED as error:
        assert str(error) and "\n" not in str(error), f"no single line: {error!r}"
        return False
    return True


def main(inputs: int, seed: int) -> int:
    """Runs the fuzzer; the exit code."""
    rng, failures, slowest, tried = np.random.default_rng(seed), 0, (0.0, ""), 0
    everything = targets()
    for name, target in everything.items():
        accepted = 0
        count = -(-inputs // len(everything))
        for content in target.seeds:
            assert name in ("N-MNIST", "CIFAR archive", "CIFAR python", "event array") or attempt(target.read, content)
        for _ in range(count):
            choice = target.seeds[int(rng.integers(0, len(target.seeds)))]
            content = rng.bytes(int(rng.integers(0, 300))) if rng.random() < 0.05 else mutate(choice, rng)
            began = time.perf_counter()
            try:
                accepted += attempt(target.read, content)
            except Exception as error:
                failures += 1
                print(f"{name}: {type(error).__name__}: {error}\n  {content[:2000].hex()}", flush=True)
            slowest = max(slowest, (time.perf_counter() - began, name))
        tried += count
        print(f"{name:>14}: {count:,} inputs, {accepted:,} accepted, {count - accepted:,} refused", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{tried:,} inputs, {failures} failures; slowest {slowest[0]:.3f} s ({slowest[1]}); peak memory {peak} MiB")
    return int(failures > 0)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(numbers + [100_000, 0][len(numbers) :])))
