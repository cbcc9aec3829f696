"""Finds a data set: prepared by TFDS, else as original files, else by a download."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mpisjax.data import cifar, fetch, idx, prepared
from mpisjax.data.recordings import EVENT_SETS, Recordings
from mpisjax.data.types import Loaded
from mpisjax.errors import UserError
from mpisjax.paths import cache_folder, expand


class Known(NamedTuple):
    """What is known of a set beforehand: image size, classes, and the sizes of its official splits."""

    size: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int


IMAGE_SETS = {
    "mnist": Known((28, 28, 1), 10, 60_000, 10_000),
    "fashion_mnist": Known((28, 28, 1), 10, 60_000, 10_000),
    "cifar10": Known((32, 32, 3), 10, 50_000, 10_000),
    "cifar100": Known((32, 32, 3), 100, 50_000, 10_000),
}


class Source(NamedTuple):
    """Where a set was found.

    Attributes:
        sentence: Where, for people.
        fingerprint: Changes when the content may have.
        read: Reads it.
    """

    sentence: str
    fingerprint: str
    read: Callable[[], Loaded]


class Missing(Exception):
    """A place has no such data; says which place."""


def find(config: Any) -> Source:
    """Tries the places in order: (a) TFDS's prepared data, (b) files in `data.dir`, (c) a download.

    Args:
        config: The `data` part of a configuration; `source` may restrict it to "tfds", "files" or "download".

    Returns:
        The first place that has the set.

    Raises:
        UserError: If none has.
    """
    return _first(config, {"tfds": _prepared, "files": _files, "download": _download})


def find_recordings(config: Any) -> tuple[Recordings, str]:
    """As `find`, for event sets, which TFDS does not have.

    Returns:
        The recordings, and where they are, for people.
    """
    return _first(config, {"files": _event_files, "download": _event_download})


Found = TypeVar("Found")


def _first(config: Any, finders: dict[str, Callable[[Any], Found]]) -> Found:
    if config.source != "auto" and config.source not in finders:
        raise UserError(
            f"data.source is {config.source!r}, but for {config.name} must be auto, {', '.join(finders)}"
        )
    if config.dir and not Path(expand(config.dir)).is_dir():
        raise UserError(f"data.dir is {config.dir!r}, but there is no such folder")
    reasons = []
    for kind in finders if config.source == "auto" else [config.source]:
        try:
            return finders[kind](config)
        except Missing as missing:
            reasons.append(str(missing))
    raise UserError(
        f"{config.name} was not found: {'; '.join(reasons)}; put {_wanted(config.name)} into {_folders(config)[0]}, or set"
        " data.dir to their folder"
    )


def _wanted(name: str) -> str:
    """The files that would do, by name."""
    if name in EVENT_SETS:
        return EVENT_SETS[name].wanted
    if name in cifar.LAYOUTS:
        return cifar.LAYOUTS[name][0].archive
    return ", ".join(f"{stem}.gz" for stem in idx.FILES.values())


def downloads_folder(config: Any) -> Path:
    """Where downloads are kept."""
    base = Path(expand(config.cache_dir)) if config.cache_dir else cache_folder()
    return base / "downloads"


def _folders(config: Any) -> list[Path]:
    """Where files are looked for: `data.dir` and its subfolder of the set's name, else beside the downloads."""
    if config.dir:
        base = Path(expand(config.dir))
        return [base, base / config.name]
    return [downloads_folder(config) / config.name]


def _prepared(config: Any) -> Source:
    place = prepared.find(config.name, config.dir)
    if place is None:
        raise Missing("TFDS has not prepared it")
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise Missing(f"TFDS has prepared it in {place}, but is not installed to read it")
    known = IMAGE_SETS[config.name]
    return Source(
        f"prepared by TFDS in {place}",
        prepared.fingerprint(place),
        partial(prepared.load, place, known.size, known.num_classes),
    )


def _files(config: Any) -> Source:
    for folder in _folders(config):
        if config.name in cifar.LAYOUTS:
            found = cifar.find(config.name, folder)
            if found is not None:
                return _source(f"files in {folder}", found.paths, partial(cifar.load, found))
        else:
            paths = idx.find(folder)
            if paths is not None:
                return _source(f"files in {folder}", tuple(paths.values()), partial(idx.load, paths))
    raise Missing(f"its files are not in {' or '.join(str(folder) for folder in _folders(config))}")


def _download(config: Any) -> Source:
    try:
        paths = fetch.download(config.name, downloads_folder(config))
    except UserError as error:
        raise Missing(str(error)) from error
    sentence = f"downloaded to {downloads_folder(config)}"
    if config.name in cifar.LAYOUTS:
        layout = cifar.LAYOUTS[config.name][0]
        found = cifar.Found(layout, (paths[layout.archive],))
        return _source(sentence, found.paths, partial(cifar.load, found))
    files = {key: paths[f"{stem}.gz"] for key, stem in idx.FILES.items()}
    return _source(sentence, tuple(files.values()), partial(idx.load, files))


def _event_files(config: Any) -> tuple[Recordings, str]:
    folders = _folders(config) if config.dir else [*_folders(config), downloads_folder(config)]
    for folder in folders:
        found = EVENT_SETS[config.name].find(folder)
        if found is not None:
            return found, f"recordings in {found.folder}"
    raise Missing(f"its recordings are not in {' or '.join(str(folder) for folder in _folders(config))}")


def _event_download(config: Any) -> tuple[Recordings, str]:
    try:
        folder = fetch.download_events(config.name, downloads_folder(config))
    except UserError as error:
        raise Missing(str(error)) from error
    found = EVENT_SETS[config.name].find(folder)
    if found is None:
        raise Missing(f"what was downloaded to {folder} has no recordings")
    return found, f"downloaded to {found.folder}"


def _source(sentence: str, paths: tuple[Path, ...], read: Callable[[], Loaded]) -> Source:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return Source(sentence, digest.hexdigest(), read)
