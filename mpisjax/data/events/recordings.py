"""Event sets: where their recordings are, which class and split each belongs to, and their frames, cached."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from mpisjax.data import cache
from mpisjax.data.dataset import Loaded
from mpisjax.data.events.frames import Binning, count_frames, store_frames, stored_frames, with_sensor
from mpisjax.data.events.readers import Invalid, Recording, Unsorted, forget, import_tonic, open_spike_trains, read
from mpisjax.errors import UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


NAMED = 5  # how many invalid recordings are named one by one
LISTED = 100  # how many recordings that were sorted or skipped are named in the log
LARGEST_SENSOR = 1 << 14  # pixels a side, of one whose size is to be found


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


class EventSet(NamedTuple):
    """What is known of a set beforehand.

    Attributes:
        width: Of the sensor.
        height: Of the sensor.
        num_classes: The number of classes.
        num_train: Recordings in the official train split.
        num_test: And in the test split.
        wanted: What its files are called, for people.
        find: Looks for them in a folder.
        channels: Of each pixel: two polarities, or the channels of a spike train.
        classes: The classes' names, if they have any.
    """

    width: int
    height: int
    num_classes: int
    num_train: int
    num_test: int
    wanted: str
    find: Callable[[Path], Recordings | None]
    channels: int = 2
    classes: tuple[str, ...] = ()


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of the last number of their names."""
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    return sorted(paths, key=lambda path: (int((re.findall(r"\d+", path.stem) or ["0"])[-1]), path.name))


def find_nmnist(folder: Path) -> Recordings | None:
    """N-MNIST: `[NMNIST/]{Train,Test}/<class>/<number>.bin`."""
    for place in (folder / "NMNIST", folder):
        splits = []
        for split in ("Train", "Test"):
            found = [
                Recording(path, label) for label in range(10) for path in _numbered(place / split / str(label), "*.bin")
            ]
            splits.append(sorted(found, key=lambda recording: recording.path.name))
        if all(splits):
            return Recordings(place, *splits)
    return None


def find_gesture(folder: Path) -> Recordings | None:
    """DVS128 Gesture: tonic's arrays in `ibmGesture{Train,Test}/<user>/<class>.npy`, else the authors' recordings."""
    for place in (folder / "DVSGesture", folder):
        splits = [
            [
                Recording(path, int(path.stem))
                for path in sorted((place / f"ibmGesture{split}").glob("*/*.npy"))
                if path.stem.isdigit() and int(path.stem) < 11
            ]
            for split in ("Train", "Test")
        ]
        if all(splits):
            return Recordings(place, *splits)
    for place in (folder / "DvsGesture", folder):
        if (place / "trials_to_train.txt").is_file() and (place / "trials_to_test.txt").is_file():
            splits = [_gesture_trials(place, split) for split in ("train", "test")]
            if all(splits):
                return Recordings(place, *splits)
    return None


def _gesture_trials(place: Path, split: str) -> list[Recording]:
    """The authors' files: `trials_to_<split>.txt` names recordings, and `<name>_labels.csv` cuts each into gestures."""
    recordings = []
    try:
        names = [line.strip() for line in (place / f"trials_to_{split}.txt").read_text().splitlines() if line.strip()]
        for name in names:
            path = place / name
            if path.name != name or not path.is_file():
                continue  # a subset, or a name that climbs out of the folder
            with (place / f"{path.stem}_labels.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    label = int(row["class"]) - 1
                    if not 0 <= label < 11:
                        raise ValueError(f"class {label + 1}")
                    recordings.append(Recording(path, label, (int(row["startTime_usec"]), int(row["endTime_usec"]))))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"the lists of recordings in {place} cannot be read ({error}): unpack the archive again"
        ) from error
    return recordings


def find_cifar10_dvs(folder: Path) -> Recordings | None:
    """CIFAR10-DVS: `<class>/*.aedat4` (tonic's) or `<class>/*.aedat` (the authors').

    It has no official split; as most do, the last tenth of each class, in the order of the file numbers, is the test
    split.
    """
    for place in (folder / "CIFAR10DVS", folder):
        for pattern in ("*.aedat4", "*.aedat"):
            train, test = [], []
            for label, name in enumerate(CIFAR10_CLASSES):
                found = [Recording(path, label) for path in _numbered(place / name, pattern)]
                count = len(found) - len(found) // 10
                train += found[:count]
                test += found[count:]
            if train and test:
                return Recordings(place, train, test)
    return None


def find_spike_trains(name: str, num_classes: int, folder: Path) -> Recordings | None:
    """SHD and SSC: `<name>_train.h5`, `<name>_test.h5` and, of SSC, `<name>_valid.h5`, as tonic unpacks them."""
    for place in (folder / name.upper(), folder):
        paths = {split: place / f"{name}_{split}.h5" for split in ("train", "test", "valid")}
        if not (paths["train"].is_file() and paths["test"].is_file()):
            continue
        splits = []
        for path in paths.values():
            labels = np.asarray(open_spike_trains(path)["labels"]) if path.is_file() else np.empty(0, int)
            if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < num_classes):
                raise UserError(f"{path} holds a label outside of 0 to {num_classes - 1}: fetch it again")
            splits.append([Recording(path, int(label), number=number) for number, label in enumerate(labels)])
        if splits[0] and splits[1]:
            return Recordings(place, *splits)
    return None


EVENT_SETS = {
    "nmnist": EventSet(
        34, 34, 10, 60_000, 10_000, "N-MNIST's Train/<class>/*.bin and Test/<class>/*.bin", find_nmnist,
        classes=tuple("0123456789"),
    ),
    "dvs_gesture": EventSet(
        128, 128, 11, 1077, 264, "DVS128 Gesture's ibmGestureTrain/*/*.npy and ibmGestureTest/*/*.npy", find_gesture
    ),
    "cifar10_dvs": EventSet(
        128, 128, 10, 9_000, 1_000, "CIFAR10-DVS's <class>/*.aedat4 or <class>/*.aedat", find_cifar10_dvs,
        classes=CIFAR10_CLASSES,
    ),
    "shd": EventSet(
        1, 1, 20, 8_156, 2_264, "SHD's shd_train.h5 and shd_test.h5", partial(find_spike_trains, "shd", 20), 700
    ),
    "ssc": EventSet(
        1, 1, 35, 75_466, 20_382, "SSC's ssc_train.h5, ssc_valid.h5 and ssc_test.h5",
        partial(find_spike_trains, "ssc", 35), 700,
    ),
}  # fmt: skip


def fingerprint(recordings: Recordings) -> str:
    """Changes when a recording does: SHA-256 of all names, labels, sizes and times. To read all would take minutes."""
    digest, stats = hashlib.sha256(), {}
    for split in recordings.splits().values():
        for recording in split:
            if recording.path not in stats:
                stat = recording.path.stat()
                stats[recording.path] = [stat.st_size, stat.st_mtime_ns]
            facts = [
                recording.named(recordings.folder),
                recording.label,
                recording.window,
                *stats[recording.path],
            ]
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
    frames, counts = count_frames(events, binning)
    tally[0] += counts.events
    tally[1] += counts.dropped
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
        logging.warning(
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
            logging.warning("%s: %d recordings %s: %s%s", name, len(names), done, ", ".join(names[:LISTED]), more)
