"""Loads an event set: recordings to frames, cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mpisjax.data import cache, digits
from mpisjax.data.events import Invalid, Recording, forget, import_tonic, read
from mpisjax.data.frames import Binning, Frames, binning_of, stored_row, stored_width, to_frames
from mpisjax.data.recordings import EVENT_SETS, Recordings, fingerprint
from mpisjax.data.types import Loaded
from mpisjax.errors import UserError

NAMED = 5  # how many invalid recordings are named one by one


def load_saccade_digits(config: Any) -> tuple[Loaded, str, str]:
    """The embedded event set; see `digits`.

    Returns:
        The frames and labels, a sentence on their source, and their checksum.
    """
    binning = binning_of(config, digits.SENSOR_SIZE, digits.SENSOR_SIZE)
    images = digits.load_images()

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        digest, first = hashlib.sha256(), 0
        for split, (pictures, labels) in zip(("train", "test"), images, strict=True):
            stream = (to_frames(events, binning) for events in digits.events_of(pictures, first=first))
            _store(allocate, split, stream, labels, binning, digest)
            first += len(labels)
        return {"checksum": digest.hexdigest()}

    entry = cache.fetch(config.cache_dir, config.name, {"binning": list(binning)}, build)
    return _loaded(entry, binning), _with_note(digits.EVENT_SENTENCE, entry), entry.facts["checksum"]


def load_recordings(config: Any, found: Recordings, where: str) -> tuple[Loaded, str, str]:
    """A set of recordings on disk.

    Args:
        config: The `data` part of a configuration.
        found: The recordings.
        where: Where they are, for people.

    Returns:
        The frames and labels, a sentence on their source, and their checksum.

    Raises:
        UserError: If any recording is invalid; none is then used.
    """
    known = EVENT_SETS[config.name]
    binning = binning_of(config, known.width, known.height)
    import_tonic()

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        forget()
        digest = hashlib.sha256()
        invalid: list[str] = []
        for split, recordings in (("train", found.train), ("test", found.test)):
            labels = np.array([recording.label for recording in recordings], np.int32)
            stream = _frames_of(recordings, binning, found.folder, invalid)
            _store(allocate, split, stream, labels, binning, digest)
        if invalid:
            total = len(found.train) + len(found.test)
            more = "; and others" if len(invalid) > NAMED else ""
            raise UserError(
                f"{len(invalid)} of the {total} recordings in {found.folder} are invalid, so none was used:"
                f" {'; '.join(invalid[:NAMED])}{more}; fetch them again or remove them"
            )
        return {"checksum": digest.hexdigest()}

    key = {"fingerprint": fingerprint(found), "binning": list(binning)}
    entry = cache.fetch(config.cache_dir, config.name, key, build)
    have = f"{len(found.train):,} train and {len(found.test):,} test recordings"
    whole = (len(found.train), len(found.test)) == (known.num_train, known.num_test)
    extent = (
        f"complete: {have}" if whole else f"a SUBSET: {have} of {known.num_train:,} and {known.num_test:,}"
    )
    return (
        _loaded(entry, binning),
        _with_note(f"{config.name}, {where}, {extent}", entry),
        entry.facts["checksum"],
    )


def _frames_of(
    recordings: list[Recording], binning: Binning, folder: Path, invalid: list[str]
) -> Iterator[np.ndarray]:
    """Frames of each recording; empty ones for an invalid one, whose name and fault are noted."""
    for recording in tqdm(
        recordings, desc="events to frames", disable=None if len(recordings) > 500 else True
    ):
        try:
            yield to_frames(read(recording, binning.width, binning.height), binning)
        except Invalid as fault:
            invalid.append(f"{recording.path.relative_to(folder)}: {fault}")
            yield np.zeros(binning.shape, np.uint8)


def _store(
    allocate: cache.Allocate,
    split: str,
    stream: Iterator[np.ndarray],
    labels: np.ndarray,
    binning: Binning,
    digest: Any,
) -> None:
    """Writes a split's frames and labels, and adds them to the checksum."""
    shape = (len(labels), stored_width(binning))
    writer = allocate(f"{split}_images", shape, np.uint8)
    digest.update(f"{shape}{binning.shape}{binning.binary}".encode())
    for frames in stream:
        row = stored_row(frames, binning.binary)
        digest.update(row.data)
        writer.append(row)
    digest.update(labels.astype("<i4").data)
    allocate(f"{split}_labels", labels.shape, np.int32).append(labels)


def _loaded(entry: cache.Entry, binning: Binning) -> Loaded:
    def frames(split: str) -> Frames:
        return Frames(entry.arrays[f"{split}_images"], binning.shape, binning.binary)

    labels = {split: np.array(entry.arrays[f"{split}_labels"]) for split in ("train", "test")}
    return Loaded(frames("train"), labels["train"], frames("test"), labels["test"])


def _with_note(sentence: str, entry: cache.Entry) -> str:
    return f"{sentence}; {entry.note}" if entry.note else sentence
