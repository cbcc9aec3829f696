"""Loads an event set: recordings to frames, cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from mpisjax.data import cache, digits
from mpisjax.data.events import Invalid, Recording, Unsorted, forget, import_tonic, read
from mpisjax.data.frames import Binning, Frames, binning_of, count_frames, stored_row, stored_width
from mpisjax.data.recordings import EVENT_SETS, Recordings, fingerprint
from mpisjax.data.types import Loaded
from mpisjax.errors import UserError

NAMED = 5  # how many invalid recordings are named one by one
LISTED = 100  # how many recordings that were sorted or skipped are named in the log


def load_saccade_digits(config: Any) -> tuple[Loaded, str, str]:
    """The embedded event set; see `digits`.

    Returns:
        The frames and labels, a sentence on their source, and their checksum.
    """
    binning = binning_of(config, digits.SENSOR_SIZE, digits.SENSOR_SIZE)
    images = digits.load_images()

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        digest, first, tally = hashlib.sha256(), 0, [0, 0]
        for split, (pictures, labels) in zip(("train", "test"), images, strict=True):
            stream = (_counted(events, binning, tally) for events in digits.events_of(pictures, first=first))
            _store(allocate, split, stream, labels, binning, digest)
            first += len(labels)
        return {"checksum": digest.hexdigest(), "events": tally[0], "dropped": tally[1]}

    entry = cache.fetch(config.cache_dir, config.name, {"binning": list(binning)}, build)
    _report(config.name, entry.facts)
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
        unsorted: list[str] = []
        tally = [0, 0]
        for split, recordings in (("train", found.train), ("test", found.test)):
            if config.unsorted_events == "skip":
                recordings = _sorted_ones(recordings, binning, found.folder, unsorted)
            if not recordings:
                raise UserError(
                    f"every {split} recording in {found.folder} is out of order, so none is left: set"
                    " data.unsorted_events to sort"
                )
            labels = np.array([recording.label for recording in recordings], np.int32)
            stream = _frames_of(
                recordings, binning, found.folder, invalid, unsorted, config.unsorted_events == "sort", tally
            )
            _store(allocate, split, stream, labels, binning, digest)
        if invalid:
            total = len(found.train) + len(found.test)
            more = "; and others" if len(invalid) > NAMED else ""
            raise UserError(
                f"{len(invalid)} of the {total} recordings in {found.folder} are invalid, so none was used:"
                f" {'; '.join(invalid[:NAMED])}{more}; fetch them again or remove them"
            )
        return {
            "checksum": digest.hexdigest(),
            "events": tally[0],
            "dropped": tally[1],
            config.unsorted_events: unsorted,
        }

    key = {
        "fingerprint": fingerprint(found),
        "binning": list(binning),
        "unsorted_events": config.unsorted_events,
    }
    entry = cache.fetch(config.cache_dir, config.name, key, build)
    _report(config.name, entry.facts)
    numbers = len(entry.arrays["train_labels"]), len(entry.arrays["test_labels"])
    have = f"{numbers[0]:,} train and {numbers[1]:,} test recordings"
    whole = numbers == (known.num_train, known.num_test)
    extent = (
        f"complete: {have}" if whole else f"a SUBSET: {have} of {known.num_train:,} and {known.num_test:,}"
    )
    return (
        _loaded(entry, binning),
        _with_note(f"{config.name}, {where}, {extent}", entry),
        entry.facts["checksum"],
    )


def _counted(events: np.ndarray, binning: Binning, tally: list[int]) -> np.ndarray:
    """A recording's frames; adds its events, and those in no frame, to the tally."""
    frames, counts = count_frames(events, binning)
    tally[0] += counts.events
    tally[1] += counts.dropped
    return frames


def _report(name: str, facts: dict[str, Any]) -> None:
    """Logs what of the recordings is not in the frames as it was recorded."""
    if facts["dropped"]:
        logging.warning(
            "%s: %s of %s events (%.2g%%) come after the last frame's end and are in no frame; see data.binning and"
            " data.num_frames",
            name,
            f"{facts['dropped']:,}",
            f"{facts['events']:,}",
            100 * facts["dropped"] / facts["events"],
        )
    for choice, done in (("sort", "sorted"), ("skip", "skipped")):
        if names := facts.get(choice):
            more = f", and {len(names) - LISTED} others" if len(names) > LISTED else ""
            logging.warning(
                "%s: %d recordings were out of order and were %s: %s%s",
                name,
                len(names),
                done,
                ", ".join(names[:LISTED]),
                more,
            )


def _sorted_ones(
    recordings: list[Recording], binning: Binning, folder: Path, unsorted: list[str]
) -> list[Recording]:
    """The recordings whose time never goes back; the names of the others are noted. Reads all once more."""
    kept = []
    for recording in recordings:
        try:
            read(recording, binning.width, binning.height)
        except Unsorted:
            unsorted.append(str(recording.path.relative_to(folder)))
            continue
        except Invalid:
            pass  # told with its fault when the frames are made
        kept.append(recording)
    return kept


def _frames_of(
    recordings: list[Recording],
    binning: Binning,
    folder: Path,
    invalid: list[str],
    unsorted: list[str],
    sort: bool,
    tally: list[int],
) -> Iterator[np.ndarray]:
    """Frames of each recording; empty ones for an invalid one, whose name and fault are noted."""
    for recording in tqdm(
        recordings, desc="events to frames", disable=None if len(recordings) > 500 else True
    ):
        try:
            try:
                events = read(recording, binning.width, binning.height)
            except Unsorted:
                if not sort:
                    raise
                events = read(recording, binning.width, binning.height, sort=True)
                unsorted.append(str(recording.path.relative_to(folder)))
            yield _counted(events, binning, tally)
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
