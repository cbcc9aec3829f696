"""Event sets: where their recordings are, and which class and split each belongs to."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpisjax.data.events.readers import Recording, open_spike_trains
from mpisjax.data.events.recordings import Recordings
from mpisjax.errors import UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class KnownSet(NamedTuple):
    """What is known of a set beforehand.

    Attributes:
        size: Of an image, or of a sensor: (height, width, channels). A pixel has two polarities as channels, or those
            of a spike train.
        num_classes: The number of classes.
        num_train: Examples in the official train split.
        num_test: And in the test split.
        wanted: What its files are called, for people.
        find: Looks for them in a folder; gives what has a `folder`, or None.
        classes: The classes' names, if they have any.
    """

    size: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int
    wanted: str
    find: Callable[[Path], Any]
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
    "nmnist": KnownSet(
        (34, 34, 2), 10, 60_000, 10_000, "N-MNIST's Train/<class>/*.bin and Test/<class>/*.bin", find_nmnist,
        tuple("0123456789"),
    ),
    "dvs_gesture": KnownSet(
        (128, 128, 2), 11, 1077, 264, "DVS128 Gesture's ibmGestureTrain/*/*.npy and ibmGestureTest/*/*.npy",
        find_gesture,
    ),
    "cifar10_dvs": KnownSet(
        (128, 128, 2), 10, 9_000, 1_000, "CIFAR10-DVS's <class>/*.aedat4 or <class>/*.aedat", find_cifar10_dvs,
        CIFAR10_CLASSES,
    ),
    "shd": KnownSet(
        (1, 1, 700), 20, 8_156, 2_264, "SHD's shd_train.h5 and shd_test.h5", partial(find_spike_trains, "shd", 20)
    ),
    "ssc": KnownSet(
        (1, 1, 700), 35, 75_466, 20_382, "SSC's ssc_train.h5, ssc_valid.h5 and ssc_test.h5",
        partial(find_spike_trains, "ssc", 35),
    ),
}  # fmt: skip
