"""Decoded arrays, kept between runs.

An entry is a folder of `.npy` files and an `entry.json` that holds the key in full, the SHA-256 of each file, and facts
about them. It is filled under another name and renamed when whole, so that a run that dies, a full disk, or two runs
filling the same entry never leave a part of one; and each file is compared with its SHA-256 before use, so that a
damaged one is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpisjax.errors import UserError
from mpisjax.paths import cache_folder, expand

VERSION = 2  # of what is stored; raised when a reader's result changes
STALE_SECONDS = 24 * 3600
_log = logging.getLogger(__name__)


Allocate = Callable[[str, tuple[int, ...], Any], Any]


class Entry(NamedTuple):
    """What was cached.

    Attributes:
        arrays: By name, memory-mapped and read-only (or in memory, where the cache could not be written).
        facts: What `build` returned.
        note: Empty, or why nothing was cached, as the end of a sentence.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    note: str


class NotWritten(Exception):
    """The cache could not be written."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Within, an error of the disk means that the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise NotWritten(error.strerror or str(error)) from error


def fetch(folder: str | Path, name: str, key: dict[str, Any], build: Callable[[Allocate], dict[str, Any]]) -> Entry:
    """Gives what is cached for a key, after building it if need be.

    Args:
        folder: The cache; empty is the user's cache folder.
        name: The beginning of the entry's name, for people.
        key: JSON values that decide what is built: the source's checksum and all settings.
        build: Gets `allocate(array_name, shape, dtype)`, whose result takes the array's rows in order by `append`, and
            returns JSON facts. It is called again if the cache turns out not to be writable: then arrays stay in
            memory.

    Returns:
        The entry.

    Raises:
        UserError: If the cache cannot be written and the arrays do not fit in memory.
    """
    folder = Path(expand(folder)) if folder else cache_folder()
    key = {"version": VERSION, **key}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    place = folder / f"{name}-{digest[:20]}"
    entry = read(place)
    if entry is not None:
        return entry
    try:
        return _fill(folder, place, key, build)
    except NotWritten as error:
        reason = f"the cache {folder} cannot be written ({error.args[0]}), so nothing was cached"
    _log.warning("%s; set data.cache_dir to another folder to load faster.", reason)
    memory: dict[str, _InMemory] = {}

    def allocate(array_name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            memory[array_name] = _InMemory(np.empty(shape, dtype))
        except MemoryError as error:
            raise UserError(f"{reason}, and {shape} do not fit in memory: set data.cache_dir") from error
        return memory[array_name]

    facts = build(allocate)
    return Entry({array_name: writer.array for array_name, writer in memory.items()}, facts, reason)


def read(place: Path) -> Entry | None:
    """Opens an entry; None if there is none, or it is damaged."""
    try:
        stored = json.loads((place / "entry.json").read_text())
        arrays = {}
        for name, digest in stored["arrays"].items():
            path = place / f"{name}.npy"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"{path.name} has changed")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return Entry(arrays, stored["facts"], "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("the cache entry %s is damaged (%s) and will be made anew", place, error)
        return None


def _fill(folder: Path, place: Path, key: dict[str, Any], build: Callable[[Allocate], dict[str, Any]]) -> Entry:
    with _writing():
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        filling = Path(tempfile.mkdtemp(prefix=".filling-", dir=folder))
    writers: dict[str, _OnDisk] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        writers[name] = _OnDisk(filling / f"{name}.npy", shape, np.dtype(dtype))
        return writers[name]

    try:
        facts = build(allocate)
        arrays = {name: writer.close() for name, writer in writers.items()}
        content = json.dumps({"key": key, "arrays": arrays, "facts": facts}, indent=1)
        with _writing():
            (filling / "entry.json").write_text(content)
            _rename(filling, place)
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(filling, ignore_errors=True)
    entry = read(place)
    if entry is None:
        raise NotWritten("what was written cannot be read back")
    return entry


def _rename(filling: Path, place: Path) -> None:
    """Puts a filled entry in its place, unless another run was faster."""
    try:
        filling.rename(place)
    except OSError:
        if read(place) is None:  # what lies there is damaged
            shutil.rmtree(place, ignore_errors=True)
            filling.rename(place)


def _remove_stale(folder: Path) -> None:
    """Removes what runs that died while filling have left."""
    for path in folder.glob(".filling-*"):
        with contextlib.suppress(FileNotFoundError):  # another run may be removing it
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


class _InMemory:
    """Writes rows into an array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self._rows = array, 0

    def append(self, rows: np.ndarray) -> None:
        self.array[self._rows : self._rows + len(rows)] = rows
        self._rows += len(rows)


class _OnDisk:
    """Writes rows to a `.npy` file front to back: a full disk is then an error and not, as in a map, a dead process."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._shape, self._dtype, self._rows, self._path = shape, dtype, 0, path
        with _writing():
            self._file = path.open("w+b")
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        if rows.shape[1:] != self._shape[1:]:
            raise ValueError(f"rows of {rows.shape[1:]} for an array of {self._shape}")
        self._rows += len(rows)
        with _writing():
            self._file.write(rows.data if rows.size else b"")

    def close(self) -> str:
        """Ends the file and gives its SHA-256."""
        if self._rows != self._shape[0]:
            raise ValueError(f"{self._rows} rows of {self._shape[0]} were written to {self._path.name}")
        with _writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.seek(0)
            digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            self._file.close()
        return digest

    def abandon(self) -> None:
        """Closes the file, if it is open, whatever its state."""
        with contextlib.suppress(OSError):
            self._file.close()
