"""Recordings of all splits as frames, cached, and what is said of those that are out of order or invalid."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mpisjax.data import cache
from mpisjax.data.dataset import Loaded
from mpisjax.data.events.frames import Binning, count_frames, store_frames, stored_frames, with_sensor
from mpisjax.data.events.readers import Invalid, Recording, Unsorted, forget, import_tonic, read
from mpisjax.errors import UserError

NAMED = 5  # how many invalid recordings are named one by one
LISTED = 100  # how many recordings that were sorted or skipped are named in the log
LARGEST_SENSOR = 1 << 14  # pixels a side, of one whose size is to be found
_log = logging.getLogger(__name__)


class Recordings(NamedTuple):
    """The recordings of the splits, and the folder that they are in; few sets come with a validation split."""

    folder: Path
    train: Sequence[Recording]
    test: Sequence[Recording]
    validation: Sequence[Recording] = ()

    def splits(self) -> dict[str, Sequence[Recording]]:
        """By name, those that there are."""
        found = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: recordings for name, recordings in found.items() if recordings}


def fingerprint(recordings: Recordings) -> str:
    """Changes when a recording does: SHA-256 of all names, labels, sizes and times. To read all would take minutes."""
    digest, stats = hashlib.sha256(), {}
    for split in recordings.splits().values():
        for recording in split:
            if recording.path not in stats:
                stat = recording.path.stat()
                stats[recording.path] = [stat.st_size, stat.st_mtime_ns]
            name = recording.named(recordings.folder)
            facts = [name, recording.label, recording.window, *stats[recording.path]]
            digest.update(json.dumps(facts).encode())
        digest.update(b"/")
    return digest.hexdigest()


class Framed(NamedTuple):
    """A set of recordings as frames.

    Attributes:
        loaded: The frames and labels.
        binning: How they were made; its sensor has been found where it was not known.
        facts: `checksum`, and what was sorted or left out.
        note: Empty, or why nothing was cached.
    """

    loaded: Loaded
    binning: Binning
    facts: dict[str, Any]
    note: str


def load_recordings(
    name: str, found: Recordings, binning: Binning, *, unsorted: str, invalid: str, cache_dir: str
) -> Framed:
    """Turns recordings into frames, or finds them in the cache.

    Args:
        name: The set's name.
        found: The recordings.
        binning: How; a sensor of width 0 is found from the events.
        unsorted: What happens to a recording whose time goes back: "refuse", "sort" or "skip".
        invalid: What happens to one that cannot be used: "refuse" or "skip".
        cache_dir: The cache's folder; empty for the user's.

    Raises:
        UserError: If a recording is invalid and not to be skipped; none is then used.
    """
    import_tonic()

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        forget()
        sized = binning if binning.width else _with_found_sensor(binning, found)
        work = _Frames(sized, found.folder, unsorted, invalid)
        digest = hashlib.sha256()
        for split, recordings in found.splits().items():
            recordings = work.usable(recordings, split)
            labels = np.array([recording.label for recording in recordings], np.int32)
            store_frames(allocate, split, work.stream(recordings), labels, sized, digest)
        if work.invalid and invalid == "refuse":
            total = sum(map(len, found.splits().values()))
            more = "; and others" if len(work.invalid) > NAMED else ""
            raise UserError(
                f"{len(work.invalid)} of the {total} recordings in {found.folder} are invalid, so none was used:"
                f" {'; '.join(work.invalid[:NAMED])}{more}; fetch them again or remove them, or set data.invalid to "
                "skip"
            )
        return {
            "checksum": digest.hexdigest(),
            "sensor": [sized.width, sized.height],
            "tally": work.tally,
            unsorted: work.unsorted,
            "invalid": work.invalid,
        }

    key = {"fingerprint": fingerprint(found), "binning": list(binning), "choices": [unsorted, invalid]}
    entry = cache.fetch(cache_dir, name, key, build)
    report(name, entry.facts)
    binning = binning._replace(width=entry.facts["sensor"][0], height=entry.facts["sensor"][1])
    return Framed(stored_frames(entry, binning), binning, entry.facts, entry.note)


def _with_found_sensor(binning: Binning, found: Recordings) -> Binning:
    """The binning for the smallest sensor that has all events."""
    width = height = 1
    for recordings in found.splits().values():
        for recording in recordings:
            try:
                events = read(recording, LARGEST_SENSOR, LARGEST_SENSOR, sort=True)
            except Invalid:
                continue  # told with its fault when the frames are made
            width, height = max(width, int(events["x"].max()) + 1), max(height, int(events["y"].max()) + 1)
    return with_sensor(binning, width, height)


def counted(events: np.ndarray, binning: Binning, tally: list[int]) -> np.ndarray:
    """A recording's frames; adds its events, and those in no frame, to the tally."""
    frames, (number, dropped) = count_frames(events, binning)
    tally[0] += number
    tally[1] += dropped
    return frames


class _Frames:
    """Makes frames, and notes what was wrong with the recordings."""

    def __init__(self, binning: Binning, folder: Path, unsorted: str, invalid: str) -> None:
        self._binning, self._folder, self._choices = binning, folder, (unsorted, invalid)
        self.unsorted: list[str] = []
        self.invalid: list[str] = []
        self.tally = [0, 0]

    def usable(self, recordings: Sequence[Recording], split: str) -> Sequence[Recording]:
        """Those that are not to be skipped; reads all once more if any may be.

        Raises:
            UserError: If none is left.
        """
        if "skip" not in self._choices:
            return recordings
        kept = []
        for recording in recordings:
            try:
                count_frames(self._read(recording, sort=self._choices[0] == "sort"), self._binning)
            except Unsorted:
                if self._choices[0] == "skip":
                    self.unsorted.append(recording.named(self._folder))
                    continue
            except Invalid as fault:
                if self._choices[1] == "skip":
                    self.invalid.append(f"{recording.named(self._folder)}: {fault}")
                    continue
            kept.append(recording)
        if not kept:
            raise UserError(
                f"every {split} recording in {self._folder} is out of order or invalid, so none is left: set"
                " data.unsorted_events to sort, or fetch them again"
            )
        return kept

    def stream(self, recordings: Sequence[Recording]) -> Iterator[np.ndarray]:
        """Frames of each recording; empty ones for an invalid one, whose name and fault are noted."""
        for recording in tqdm(recordings, desc="events to frames", disable=None if len(recordings) > 500 else True):
            try:
                try:
                    events = self._read(recording)
                except Unsorted:
                    if self._choices[0] != "sort":
                        raise
                    events = self._read(recording, sort=True)
                    self.unsorted.append(recording.named(self._folder))
                yield counted(events, self._binning, self.tally)
            except Invalid as fault:
                self.invalid.append(f"{recording.named(self._folder)}: {fault}")
                yield np.zeros(self._binning.shape, np.uint8)

    def _read(self, recording: Recording, sort: bool = False) -> np.ndarray:
        return read(recording, self._binning.width, self._binning.height, sort, self._binning.channels)


def report(name: str, facts: dict[str, Any]) -> None:
    """Logs what of the recordings is not in the frames as it was recorded."""
    events, dropped = facts["tally"]
    if dropped:
        _log.warning(
            "%s: %s of %s events (%.2g%%) come after the last frame's end and are in no frame; see data.binning and"
            " data.num_frames",
            name, f"{dropped:,}", f"{events:,}", 100 * dropped / events,
        )  # fmt: skip
    for choice, done in (
        ("sort", "were out of order and were sorted"),
        ("skip", "were out of order and were skipped"),
        ("invalid", "were invalid and were skipped"),
    ):
        if names := facts.get(choice):
            more = f", and {len(names) - LISTED} others" if len(names) > LISTED else ""
            _log.warning("%s: %d recordings %s: %s%s", name, len(names), done, ", ".join(names[:LISTED]), more)
