"""Downloads the original files through TFDS's download manager, which checks them against recorded checksums."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mpisjax.errors import UserError

PROBE_SECONDS = 4.0  # to answer a request for the file's size; all that a run without network waits for
STALL_SECONDS = 30.0  # without a byte, once a download has begun
RETRIES = 2
STALE_SECONDS = 24 * 3600  # after which an unfinished download is taken for dead
MIRROR = "MPISJAX_MIRROR"


def recorded(name: str) -> dict[str, Any]:
    """The files of a data set: TFDS's `UrlInfo` (size, SHA-256, file name) by address.

    With `MPISJAX_MIRROR` set to the address of a folder, its files stand in for the original addresses; their checksums
    remain those that TFDS has recorded.

    Raises:
        UserError: If TFDS is not installed.
    """
    try:
        import tensorflow_datasets as tfds  # slow, and not wanted unless something is to be downloaded
    except ImportError as error:
        raise UserError(
            f"downloading needs TFDS ({error}): pip install tensorflow-datasets importlib_resources"
        ) from error
    infos = dict(tfds.builder_cls(name).url_infos)
    mirror = os.environ.get(MIRROR)
    if mirror:
        infos = {f"{mirror.rstrip('/')}/{info.filename}": info for info in infos.values()}
    return infos


def download(name: str, folder: Path) -> dict[str, Path]:
    """Downloads the files of a data set, unless they are there already.

    Args:
        name: The set's name, in TFDS and here.
        folder: Where to keep them.

    Returns:
        The files by their original names, checksums verified.

    Raises:
        UserError: If the server cannot be reached within `PROBE_SECONDS`, the download fails or stalls, a checksum is
            wrong, or the folder cannot be written.
    """
    infos = recorded(name)
    from tensorflow_datasets.core.download.download_manager import DownloadManager

    try:
        manager = DownloadManager(
            download_dir=folder, url_infos=infos, dataset_name=name, force_checksums_validation=True
        )
        known = getattr(
            manager, "_get_checksum_dl_result", None
        )  # private, so it may go: then the server is always asked
        cached = known is not None and all(known(_resource(url)) for url in infos)
        earlier = set(_unfinished(folder))
        for path in earlier:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): set data.cache_dir"
        ) from error
    if not cached:
        for host_url in {urlsplit(url).netloc: url for url in infos}.values():
            probe(host_url)
    try:
        with _patience():
            paths = manager.download({info.filename: url for url, info in infos.items()})
    except Exception as error:  # TFDS, requests, promise and the file system each have their own
        for path in set(_unfinished(folder)) - earlier:  # those of before may be another run's
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(_explain(name, error)) from error
    return {filename: Path(path) for filename, path in paths.items()}


def _unfinished(folder: Path) -> list[Path]:
    """The folders in which TFDS keeps a file until it is whole and checked."""
    return [path for path in folder.glob("**/*.tmp.*") if path.is_dir()]


def _resource(url: str) -> Any:
    from tensorflow_datasets.core.download import resource

    return resource.Resource(url=url)


def _explain(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "NonMatchingChecksumError":
        return f"a file of {name} was downloaded with a wrong checksum and was not used: {text[:300]}"
    return f"the download of {name} failed: {type(error).__name__}: {text[:300]}"


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


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Bounds what TFDS leaves unbounded: it waits for ever for a server that goes silent, and retries for minutes."""
    import requests
    from tensorflow_datasets.core.download import downloader

    send, retries = requests.adapters.HTTPAdapter.send, downloader.MAX_RETRIES

    def send_in_time(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["timeout"] = kwargs.get("timeout") or STALL_SECONDS
        return send(self, request, *args, **kwargs)

    requests.adapters.HTTPAdapter.send = send_in_time  # type: ignore[method-assign]
    downloader.MAX_RETRIES = RETRIES
    try:
        yield
    finally:
        requests.adapters.HTTPAdapter.send = send  # type: ignore[method-assign]
        downloader.MAX_RETRIES = retries
