"""Downloads original files, by `pooch`. TFDS has recorded the checksums of the image sets, tonic those of events."""

from __future__ import annotations

import os
import shutil
import tarfile
import threading
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mpisjax.data.events.readers import import_tonic
from mpisjax.data.prepared import import_tfds
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


def recorded(name: str) -> dict[str, Any]:
    """The files of an image set: TFDS's `UrlInfo` (size, SHA-256, file name) by address.

    With `MPISJAX_MIRROR` set to the address of a folder, its files stand in for the original addresses; their checksums
    remain those that TFDS has recorded.

    Raises:
        UserError: If TFDS is not installed.
    """
    tfds = import_tfds("downloading")
    infos = dict(tfds.builder_cls(name).url_infos)
    return {_address(url, info.filename): info for url, info in infos.items()}


def _address(url: str, filename: str) -> str:
    """Where to download a file from: the mirror's folder, or the original address where no mirror is set."""
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{filename}" if mirror else url


def download(name: str, folder: Path) -> None:
    """Downloads the files of an image set into a folder, unless they are there already; their checksums are verified.

    Args:
        name: The set's name, in TFDS and here.
        folder: Where to keep them.

    Raises:
        UserError: If the server cannot be reached within `PROBE_SECONDS`, the download fails or stalls, a checksum is
            wrong, or the folder cannot be written.
    """
    _retrieve(name, [(url, info.filename, f"sha256:{info.checksum}") for url, info in recorded(name).items()], folder)


def download_events(name: str, folder: Path) -> None:
    """Downloads and unpacks an event set.

    It is unpacked under another name and renamed when whole, so a download cut short is never taken for a subset.

    Args:
        name: The set's name in the configuration.
        folder: Where to keep it.

    Raises:
        UserError: If the server cannot be reached within seconds, the download fails or stalls, a checksum is wrong, or
            the folder cannot be written.
    """
    kind = EVENT_CLASSES[name]
    known = getattr(import_tonic().datasets, kind)
    if hasattr(known, "train_zip"):  # SHD and SSC
        zips = [part for part in ("train", "valid", "test") if hasattr(known, f"{part}_zip")]
        keys = [(f"{part}_zip", f"{part}_md5") for part in zips]
        addresses = [known.base_url + getattr(known, filename) for filename, _ in keys]
    else:
        parts = ["train_", "test_"] if hasattr(known, "train_url") else [""]
        keys = [(f"{part}filename", f"{part}md5" if part else "file_md5") for part in parts]
        addresses = [getattr(known, f"{part}url") for part in parts]
    files = [
        (_address(url, getattr(known, filename)), getattr(known, filename), f"md5:{getattr(known, digest)}")
        for url, (filename, digest) in zip(addresses, keys, strict=True)
    ]
    partial = folder / f".partial-{kind}"
    _retrieve(name, files, partial)
    unpacked = partial / kind
    try:
        shutil.rmtree(unpacked, ignore_errors=True)  # what a run that died has left
        for _, filename, _ in files:
            _unpack(partial / filename, unpacked)
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


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".zip":  # whose members that climb out are skipped
        shutil.unpack_archive(archive, folder)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


def _retrieve(name: str, files: list[tuple[str, str, str]], folder: Path) -> None:
    """Downloads (address, file name, checksum) into a folder."""
    import pooch

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): set data.cache_dir") from error
    if not all((folder / filename).exists() for _, filename, _ in files):
        for url in {urlsplit(url).netloc: url for url, _, _ in files}.values():
            probe(url)
    downloader = pooch.HTTPDownloader(timeout=STALL_SECONDS, chunk_size=1 << 16)
    for url, filename, known_hash in files:
        try:
            pooch.retrieve(url, known_hash, fname=filename, path=folder, downloader=downloader)
        except (ValueError, OSError, EOFError) as error:  # those of requests are a kind of OSError
            if isinstance(error, OSError) or "hash" not in str(error):
                raise UserError(f"the download of {name} failed: {_line(error)}") from error
            raise UserError(
                f"{filename} of {name} was corrupted on its way, with a wrong checksum, and was not used:"
                " try again, or set data.dir to a folder with the file"
            ) from error


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
