"""Finds files of one's own by split and class: in `{train,test}/CLASS`, or in `CLASS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpisjax.data.arrays import in_both_splits, split_test
from mpisjax.errors import UserError
from mpisjax.paths import expand

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
NAMED = 5  # how many unusable files are named one by one


class Files(NamedTuple):
    """Files by split and class.

    Attributes:
        folder: Where they are.
        classes: The classes' names: those of their folders.
        splits: By split, (path, class) in the order of the names.
        how: Clauses for the log: how the splits were made, and what was left out.
    """

    folder: Path
    classes: tuple[str, ...]
    splits: dict[str, list[tuple[Path, int]]]
    how: list[str]

    def fingerprint(self) -> str:
        """Changes when a file does: SHA-256 of all names, labels, sizes and times."""
        facts = []
        for split, files in self.splits.items():
            for path, label in files:
                stat = path.stat()
                facts.append([split, str(path.relative_to(self.folder)), label, stat.st_size, stat.st_mtime_ns])
        return hashlib.sha256(json.dumps([facts, self.classes, self.how]).encode()).hexdigest()


def find_files(folder: str | Path, endings: Sequence[str], test_share: float, invalid: str) -> Files:
    """Finds the files of each class and split.

    Args:
        folder: Where `{train,test}/CLASS/*` or `CLASS/*` are.
        endings: The endings of the files that are wanted, in small letters.
        test_share: The share of the files that becomes the test split where there is none.
        invalid: What happens to other files, and to a class that is in one split alone: "refuse" or "skip". Hidden
            files are always left out.

    Raises:
        UserError: There is no such folder or file, or one that is not to be skipped.
    """
    folder = Path(expand(folder))
    layout = (
        f"put files ({', '.join(endings)}) into {folder}/train/CLASS and {folder}/test/CLASS, or into {folder}/CLASS"
    )
    if not folder.is_dir():
        there = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"data.dir is '{folder}', which {there}: {layout}")
    found = _Scan(folder, endings)
    places = found.places()
    by_name = {split: found.classes_in(place) for split, place in places.items()}
    if found.unusable and invalid != "skip":
        raise UserError(refusal(folder, found.unusable, "remove it"))
    names = {name for classes in by_name.values() for name, paths in classes.items() if paths}
    if not names:
        raise UserError(f"{folder} has no such files: {layout}")
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name), name) if numbers else (0, name)))
    number = {name: label for label, name in enumerate(classes)}
    splits = {
        split: [(path, number[name]) for name in classes for path in by_class.get(name, ())]
        for split, by_class in by_name.items()
    }
    how = []
    if "test" not in splits:
        labels = np.array([label for _, label in splits["train"]])
        train, test = split_test(labels, test_share)
        everything = splits["train"]
        splits["train"], splits["test"] = [everything[n] for n in train], [everything[n] for n in test]
        how.append("split by a fixed seed")
    elif places["test"].name.lower() in SPLITS["validation"]:
        how.append(f"the test split is {places['test'].name}")
    if found.hidden:
        how.append(f"{found.hidden} hidden files left out")
    if found.unusable:
        how.append(f"{len(found.unusable)} other files left out ({found.unusable[0]})")
    return of_common_classes(Files(folder, classes, splits, how), invalid)


def of_common_classes(files: Files, invalid: str) -> Files:
    """Makes sure that each class is in train and test, or leaves it out where `invalid` is "skip"."""
    labels = {split: np.array([label for _, label in found], np.int32) for split, found in files.splits.items()}
    try:
        kept = in_both_splits(labels["train"], labels["test"], files.classes, invalid)
    except UserError as error:
        raise UserError(f"{files.folder}: {error}") from error
    splits = {
        split: [(path, int(kept.number[label])) for path, label in found if kept.number[label] >= 0]
        for split, found in files.splits.items()
    }
    return Files(files.folder, kept.classes, splits, [*files.how, *([kept.note[2:]] if kept.note else [])])


def refusal(folder: Path, unusable: Sequence[str], remedy: str) -> str:
    """One sentence on files that cannot be used."""
    more = f" (and {len(unusable) - 1} others)" if len(unusable) > 1 else ""
    named = "; ".join(unusable[:NAMED])
    return (
        f"{folder} has files that cannot be used{more}: {named}; {remedy}, or set data.invalid to skip to leave such "
        "files out"
    )


class _Scan:
    """Looks through a folder; notes hidden files and others that are not wanted."""

    def __init__(self, folder: Path, endings: Sequence[str]) -> None:
        self._folder, self._endings = folder, endings
        self.hidden = 0
        self.unusable: list[str] = []

    def _entries(self, place: Path) -> list[Path]:
        entries = sorted(place.iterdir())
        shown = [path for path in entries if not path.name.startswith(".")]
        self.hidden += len(entries) - len(shown)
        return shown

    def places(self) -> dict[str, Path]:
        """The folder of each split; of "train" alone where the classes lie in the folder itself."""
        top = {path.name.lower(): path for path in sorted(self._folder.iterdir()) if path.is_dir()}
        found = {
            split: next(top[name] for name in names if name in top)
            for split, names in SPLITS.items()
            if any(name in top for name in names)
        }
        # "train" may also be a class, of vehicles say: then it has files and no folders.
        if "train" not in found or not any(path.is_dir() for path in found["train"].iterdir()):
            return {"train": self._folder}
        if "test" not in found and "validation" in found:
            found["test"] = found.pop("validation")
        for path in self._entries(self._folder):
            if path not in found.values() and path.is_dir():
                self._note(path, "it lies beside the folder train, but is no split")
        return found

    def classes_in(self, place: Path) -> dict[str, list[Path]]:
        """The files of each class folder."""
        classes = {}
        for path in self._entries(place):
            if path.is_dir():
                classes[path.name] = [file for file in self._entries(path) if self._usable(file)]
                if not classes[path.name]:
                    self._note(path, "it has no file that can be used")
            elif path.suffix.lower() in self._endings:
                self._note(path, "it lies in no class folder")
        return classes

    def _usable(self, path: Path) -> bool:
        if path.is_dir():
            self._note(path, "it is a folder within a class")
        elif path.suffix.lower() not in self._endings:
            self._note(path, f"it is none of {', '.join(self._endings)}")
        elif not path.is_file():
            self._note(path, "it is a broken link or no regular file")
        elif not path.stat().st_size:
            self._note(path, "it is empty")
        else:
            return True
        return False

    def _note(self, path: Path, why: str) -> None:
        self.unusable.append(f"{path.relative_to(self._folder)}: {why}")
