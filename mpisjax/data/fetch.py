"""Fetches original files: checked downloads, and members of archives read without trust.

`pooch` downloads. The checksums are not ours: TFDS records those of the image sets, tonic those of the event sets.
CIFAR's archives are read by hand, within bounds, as no library refuses a member that climbs out, a link and a bomb
without writing to disk first.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import tarfile
import threading
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from mpisjax.data.events.readers import import_tonic
from mpisjax.errors import UserError

PROBE_SECONDS = 4.0  # to answer a request for the file's size; a run without network waits no longer
STALL_SECONDS = 30.0  # without a byte, once a download has begun
MIRROR = "MPISJAX_MIRROR"
EVENT_CLASSES = {
    "nmnist": "NMNIST",
    "dvs_gesture": "DVSGesture",
    "cifar10_dvs": "CIFAR10DVS",
    "shd": "SHD",
    "ssc": "SSC",
}
MAX_BYTES = 512 << 20  # decompressed; the CIFAR archives have 185 MB
MAX_MEMBERS = 1000


def recorded(name: str) -> dict[str, Any]:
    """The files of an image set: TFDS's `UrlInfo` (size, SHA-256, file name) by address.

    With `MPISJAX_MIRROR` set to the address of a folder, its files stand in for the original addresses; their checksums
    remain those that TFDS has recorded.

    Raises:
        UserError: If TFDS is not installed.
    """
    try:
        import tensorflow_datasets as tfds  # slow to import, and needed for a download alone
    except ImportError as error:
        raise UserError(
            f"downloading needs TFDS ({error}): pip install tensorflow-datasets importlib_resources"
        ) from error
    infos = dict(tfds.builder_cls(name).url_infos)
    return {_address(url, info.filename): info for url, info in infos.items()}


def _address(url: str, filename: str) -> str:
    """Where to download a file from: the mirror's folder, or the original address where no mirror is set."""
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{filename}" if mirror else url


def download(name: str, folder: Path) -> dict[str, Path]:
    """Downloads the files of an image set, unless they are there already.

    Args:
        name: The set's name, in TFDS and here.
        folder: Where to keep them, in a folder of the set's name.

    Returns:
        The files by their original names, checksums verified.

    Raises:
        UserError: If the server cannot be reached within `PROBE_SECONDS`, the download fails or stalls, a checksum is
            wrong, or the folder cannot be written.
    """
    files = [(url, info.filename, f"sha256:{info.checksum}") for url, info in recorded(name).items()]
    return _retrieve(name, files, folder / name)


def download_events(name: str, folder: Path) -> Path:
    """Downloads and unpacks an event set.

    It is unpacked under another name and renamed when whole, so a download cut short is never taken for a subset.

    Args:
        name: The set's name in the configuration.
        folder: Where to keep it.

    Returns:
        The folder that has the set in it.

    Raises:
        UserError: If the server cannot be reached within seconds, the download fails or stalls, a checksum is wrong, or
            the folder cannot be written.
    """
    kind = EVENT_CLASSES[name]
    known = getattr(import_tonic().datasets, kind)
    if hasattr(known, "train_zip"):  # SHD and SSC
        names = [n for n in ("train", "valid", "test") if hasattr(known, f"{n}_zip")]
        recorded_files = [
            (
                known.base_url + getattr(known, f"{n}_zip"),
                getattr(known, f"{n}_zip"),
                getattr(known, f"{n}_md5"),
            )
            for n in names
        ]
    else:
        prefixes = ["train_", "test_"] if hasattr(known, "train_url") else [""]
        recorded_files = [
            (
                getattr(known, f"{p}url"),
                getattr(known, f"{p}filename"),
                getattr(known, f"{p}md5" if p else "file_md5"),
            )
            for p in prefixes
        ]
    files = [(_address(url, filename), filename, f"md5:{digest}") for url, filename, digest in recorded_files]
    partial = folder / f".partial-{kind}"
    archives = _retrieve(name, files, partial)
    unpacked = partial / kind
    try:
        shutil.rmtree(unpacked, ignore_errors=True)  # what a run that died has left
        for path in archives.values():
            _unpack(path, unpacked)
        for inner in getattr(known, "data_filename", ()):  # CIFAR10-DVS: an archive for each class
            _unpack(unpacked / inner, unpacked)
            (unpacked / inner).unlink()
        if (folder / kind).exists():
            shutil.rmtree(folder / kind)
        unpacked.rename(folder / kind)
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, RuntimeError) as error:
        raise UserError(
            f"the archives of {name} in {partial} cannot be unpacked ({_line(error)}): remove them"
        ) from error
    shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".zip":  # whose members that climb out are skipped
        shutil.unpack_archive(archive, folder)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


def _retrieve(name: str, files: list[tuple[str, str, str]], folder: Path) -> dict[str, Path]:
    """Downloads (address, file name, checksum) into a folder; gives the files by name."""
    import pooch
    import requests

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): set data.cache_dir") from error
    if not all((folder / filename).exists() for _, filename, _ in files):
        for url in {urlsplit(url).netloc: url for url, _, _ in files}.values():
            probe(url)
    downloader = pooch.HTTPDownloader(timeout=STALL_SECONDS, chunk_size=1 << 16)
    paths = {}
    for url, filename, known_hash in files:
        try:
            path = pooch.retrieve(url, known_hash, fname=filename, path=folder, downloader=downloader)
        except ValueError as error:
            if isinstance(error, requests.RequestException) or "hash" not in str(error):
                raise UserError(f"the download of {name} failed: {_line(error)}") from error
            raise UserError(
                f"{filename} of {name} was corrupted on its way, with a wrong checksum, and was not used:"
                " try again, or set data.dir to a folder with the file"
            ) from error
        except (OSError, EOFError) as error:  # of which those of requests are a kind
            raise UserError(f"the download of {name} failed: {_line(error)}") from error
        paths[filename] = Path(path)
    return paths


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def probe(url: str) -> None:
    """Asks a server for a file's size, to learn within seconds whether it can be reached at all.

    In a thread, as looking up a name has no time limit of its own.

    Raises:
        UserError: If there is no answer within `PROBE_SECONDS`.
    """
    import requests

    failure: list[str] = ["no answer"]

    def ask() -> None:
        try:
            requests.head(url, timeout=PROBE_SECONDS / 2, allow_redirects=False)
            failure.clear()
        except (requests.RequestException, OSError, ValueError) as error:
            failure[0] = type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if failure:
        raise UserError(f"{urlsplit(url).netloc} cannot be reached ({failure[0]})")


class TooLarge(Exception):
    """More was decompressed than is accepted."""


class Bounded(io.RawIOBase):
    """A stream that refuses to give more than so many bytes in all."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        super().__init__()
        self._stream, self._left = stream, limit

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes.

        Raises:
            TooLarge: If the stream has more than the limit.
        """
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        block = self._stream.read(wanted)
        self._left -= len(block)
        if self._left < 0:
            raise TooLarge
        return block


def read_members(path: Path, wanted: Collection[str], limit: int = MAX_BYTES) -> dict[str, bytes]:
    """Reads members of a tar archive, gzipped or plain.

    Args:
        path: The archive.
        wanted: The names of the members to keep, e.g. "cifar-10-batches-bin/test_batch.bin".
        limit: How many bytes the whole archive may decompress to.

    Returns:
        The contents by name; a wanted member that is not there is left out.

    Raises:
        UserError: If the archive is truncated, damaged, too large, or has a member with a path that climbs out of it,
            or if a wanted member is no regular file.
    """
    try:
        with path.open("rb") as raw:
            return parse(raw, str(path), wanted, limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def parse(raw: BinaryIO, name: str, wanted: Collection[str], limit: int = MAX_BYTES) -> dict[str, bytes]:
    """As `read_members`, from an open and seekable file called `name` in errors."""
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    stream: BinaryIO = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
    bounded = Bounded(stream, limit)
    found: dict[str, bytes] = {}
    try:
        # Read as a stream: nothing can make it seek backwards, so no header can make it go in circles.
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for count, member in enumerate(archive):
                _check_member(name, count, member)
                if member.name in wanted:
                    found[member.name] = _content(name, archive, member, limit)
        while bounded.read(1 << 20):  # to the end, so that gzip checks its checksum
            pass
    except TooLarge:
        raise UserError(f"{name} decompresses to more than {limit >> 20} MiB, which is no such data set") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, struct.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is truncated or damaged ({error}): fetch the archive again") from error
    return found


def _check_member(name: str, count: int, member: tarfile.TarInfo) -> None:
    if count >= MAX_MEMBERS:
        raise UserError(f"{name} has more than {MAX_MEMBERS} members, which is no such data set")
    for target in (member.name, member.linkname):
        parts = PurePosixPath(target)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{name} has a member that climbs out of the archive ({target!r}): do not use it")


def _content(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not member.isreg():
        raise UserError(f"{name}: {member.name} is no regular file: fetch the archive again")
    if member.size > limit:
        raise TooLarge
    stream = archive.extractfile(member)
    content = b"" if stream is None else stream.read()
    if len(content) != member.size:
        raise UserError(f"{name}: {member.name} is truncated: fetch the archive again")
    return content
