"""Arrays of one's own as a data set: in memory, or from an `.npz` file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mpisjax.data.dataset import DataSet, HoldOut, Loaded, assemble, checksum, hold_out
from mpisjax.errors import UserError
from mpisjax.paths import expand

KEYS = ("x_train", "y_train", "x_test", "y_test")
SPLIT_SEED = 0  # of the test split where there is none: a property of the data, whatever a run's seeds are
LISTED = 20  # classes that the log lists
CHUNK = 1024  # images scaled at a time


def from_arrays(
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    value_range: tuple[float, float] | None = None,
    test_share: float = 0.2,
    num_validation: int = 0,
    validation_share: float = 0.0,
    split_seed: int = 0,
    invalid: str = "refuse",
    source: str = "arrays in memory",
) -> DataSet:
    """Makes a data set of arrays.

    Args:
        x: Images [N, H, W] or [N, H, W, C], or event frames [N, T, H, W, C]; uint8, or any numbers with `value_range`.
        y: Classes [N]: any integers or strings. They are numbered from 0 in their order; `DataSet.classes` lists them.
        x_test: As `x`; None: a share of `x`, each class in proportion, always the same one.
        y_test: As `y`.
        value_range: The (lowest, highest) number that `x` can hold, which become 0 and 255; None: `x` is uint8.
        test_share: The share of the examples that becomes the test split where `x_test` is None.
        num_validation: Examples of the train split that are held out for validation.
        validation_share: Or their share, where `num_validation` is 0.
        split_seed: Chooses the examples that are held out.
        invalid: What happens to a class that is in one split alone: "refuse" or "skip".
        source: Where the arrays came from, for the log.

    Returns:
        The data set.

    Raises:
        UserError: A shape, a dtype, a value or a label cannot be used.
    """
    if (x_test is None) != (y_test is None):
        raise UserError("one of x_test and y_test is missing: give both, or neither for a split by a fixed seed")
    examples = [(_bytes(x, value_range, "x"), _classes(y, "y"))]
    if x_test is not None:
        examples.append((_bytes(x_test, value_range, "x_test"), _classes(y_test, "y_test")))
    for (images, labels), which in zip(examples, ("", "_test"), strict=False):
        if len(images) != len(labels):
            raise UserError(
                f"x{which} has {len(images)} examples and y{which} {len(labels)} labels: give each one label"
            )
    if len({labels.dtype.kind for _, labels in examples}) > 1:
        raise UserError("y and y_test are not both numbers or both strings: give the classes the same names in both")
    names, codes = np.unique(np.concatenate([labels for _, labels in examples]), return_inverse=True)
    codes = codes.astype(np.int32)
    images, size = examples[0][0], len(examples[0][0])
    if x_test is None:
        splits = [(images[rows], codes[rows]) for rows in split_test(codes, test_share)]
    else:
        splits = [(images, codes[:size]), (examples[1][0], codes[size:])]
    shapes = [list(images.shape[1:]) for images, _ in splits]
    if shapes[0] != shapes[1]:
        raise UserError(f"an example of x has the shape {shapes[0]}, one of x_test {shapes[1]}: give both the same")
    kept = in_both_splits(splits[0][1], splits[1][1], tuple(map(str, names)), invalid)
    numbered = [(images, kept.number[labels]) for images, labels in splits]
    train, test = ((images[labels >= 0], labels[labels >= 0]) for images, labels in numbered)
    loaded = Loaded(*train, *test)
    how = ", split by a fixed seed" if x_test is None else ""
    size_text = " x ".join(map(str, shapes[0]))
    return assemble(
        "arrays",
        loaded,
        len(kept.classes),
        source=f"{source}: {len(loaded.train_labels):,} train and {len(loaded.test_labels):,} test "
        f"examples of {size_text}{how}; {listed(kept.classes)}{kept.note}",
        digest=checksum(loaded),
        validation=HoldOut(num_validation, validation_share, split_seed),
        classes=kept.classes,
    )


def from_file(path: str | Path, **options: Any) -> DataSet:
    """The arrays x_train, y_train, x_test and y_test of an `.npz` file; `options` are those of `from_arrays`.

    Raises:
        UserError: It is no such file, or its arrays cannot be used.
    """
    path = Path(expand(path))
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise UserError(
            f"data.dir is '{path}', which is {what}, but data.name is 'arrays': give an .npz file with "
            f"{', '.join(KEYS)}"
        )
    call = f"numpy.savez(FILE, {', '.join(f'{key}=...' for key in KEYS)})"
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read (it is no .npz file): write it with {call}")
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            content = {key: file[key] for key in KEYS if key in file.files}
    except Exception as error:  # NumPy and zipfile raise what they like for a damaged file
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} cannot be read ({why}): write it with numpy.savez, and strings with .astype(str)"
        ) from error
    if missing := [key for key in KEYS if key not in content]:
        raise UserError(f"{path} has no {', '.join(missing)}: write it with {call}")
    try:
        return from_arrays(*(content[key] for key in KEYS), source=f"arrays of {path}", **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_range(text: str) -> tuple[float, float] | None:
    """The setting `data.value_range`, such as "0,1"; None where it is empty.

    Raises:
        UserError: It is no two rising numbers.
    """
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
        if not -np.inf < low < high < np.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"data.value_range is {text!r}: give the lowest and the highest number, such as 0,1") from None
    return low, high


def scaled(images: np.ndarray, value_range: tuple[float, float], name: str) -> np.ndarray:
    """Numbers to bytes: the lowest of the range becomes 0, the highest 255.

    Raises:
        UserError: A number lies outside of the range, or is none.
    """
    low, high = value_range
    least, most = float(images.min()), float(images.max())
    if not np.isfinite([least, most]).all():
        raise UserError(f"{name} holds values that are no finite numbers: replace them, or leave their examples out")
    if not low <= least <= most <= high:
        raise UserError(
            f"{name} goes from {least:g} to {most:g}, outside of data.value_range, {low:g} to {high:g}: widen the range"
        )
    scaled = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].astype(np.float64)
        scaled[start : start + CHUNK] = np.rint((chunk - low) * (255 / (high - low)))
    return scaled


def _bytes(x: Any, value_range: tuple[float, float] | None, name: str) -> np.ndarray:
    """Examples as uint8 [N, H, W, C] or [N, T, H, W, C]."""
    try:
        images = np.asarray(x)
    except ValueError:
        images = np.empty(0, object)
    if images.dtype.kind not in "iufb":
        raise UserError(f"{name} is no array of numbers (dtype {images.dtype}): give all examples one shape")
    if images.ndim not in (3, 4, 5) or not images.size:
        raise UserError(
            f"{name} has the shape {list(images.shape)}: give images [N, H, W] or [N, H, W, C], or frames "
            "[N, T, H, W, C]"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise UserError(f"{name} has the shape {list(images.shape)}: put the channels last, x.transpose(0, 2, 3, 1)")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype == bool and value_range is None:
        value_range = (0, 1)
    if value_range is not None:
        return scaled(images, value_range, name)
    if images.dtype != np.uint8:
        raise UserError(
            f"{name} is {images.dtype} from {float(images.min()):g} to {float(images.max()):g}: say which numbers it "
            "can hold with data.value_range, such as 0,1, or give uint8"
        )
    return images


def _classes(y: Any, name: str) -> np.ndarray:
    """Labels as integers or strings [N]."""
    labels = np.asarray(y)
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(str)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(
            f"{name} has the shape {list(labels.shape)}: give one class an example, {name}.argmax(1) if it is one-hot"
        )
    if labels.dtype.kind not in "iubU":
        raise UserError(
            f"{name} is {labels.dtype}: give the classes as integers or strings, such as {name}.astype(int)"
        )
    return labels.astype(np.int64) if labels.dtype.kind == "b" else labels


def split_test(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the test split, each class in proportion, and one example at least: (train, test) indices.

    Raises:
        UserError: The share leaves one of them empty.
    """
    count = round(share * len(labels))
    if not 0 < count < len(labels):
        raise UserError(
            f"data.test_share is {share:g}, which makes {count} of {len(labels)} examples the test split: choose a "
            "share that leaves some for both"
        )
    chosen = np.zeros(len(labels), bool)
    chosen[hold_out(labels, count, SPLIT_SEED)[1]] = True
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1 and len(set(chosen[members])) == 1:  # a small class, all in one split
            chosen[members[-1]] = ~chosen[members[-1]]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class Kept(NamedTuple):
    """The classes that are in both splits.

    Attributes:
        number: The new number of each class, int32; -1 for one that is left out.
        classes: The names of those that are kept.
        note: Empty, or a clause on those that are not.
    """

    number: np.ndarray
    classes: tuple[str, ...]
    note: str


def in_both_splits(train: np.ndarray, test: np.ndarray, classes: Sequence[str], invalid: str) -> Kept:
    """Makes sure that each class is in both splits, or leaves it out where `invalid` is "skip".

    Args:
        train: Labels of the train split, int [N].
        test: Labels of the test split, int [M].
        classes: The classes' names.
        invalid: "refuse" or "skip".

    Raises:
        UserError: A class is in one split alone, or there are not two classes.
    """
    numbers = np.arange(len(classes))
    both = np.isin(numbers, train) & np.isin(numbers, test)
    alone = np.flatnonzero(~both).tolist()
    if len(alone) and invalid != "skip":
        split = "test" if alone[0] in train else "train"
        more = f" ({len(alone)} classes are in one split alone)" if len(alone) > 1 else ""
        raise UserError(
            f"class {classes[alone[0]]!r} has no {split} example{more}: add one, remove the class, or set data.invalid "
            "to skip to leave it out"
        )
    kept = tuple(name for name, kept in zip(classes, both, strict=True) if kept)
    if len(kept) < 2:
        number = f"is {len(kept)} class" if len(kept) == 1 else f"are {len(kept)} classes"
        raise UserError(f"there {number} with train and test examples: give at least 2")
    names = ", ".join(classes[number] for number in alone[:LISTED])
    return Kept(
        np.where(both, np.cumsum(both) - 1, -1).astype(np.int32),
        kept,
        f"; {len(alone)} left out, in one split alone: {names}" if len(alone) else "",
    )


def listed(classes: Sequence[str]) -> str:
    """The classes with their numbers, for the log."""
    if list(classes) == [str(number) for number in range(len(classes))]:
        return f"{len(classes)} classes: 0 to {len(classes) - 1}"
    some = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:LISTED]))
    return f"{len(classes)} classes: {some}{f' and {len(classes) - LISTED} others' if len(classes) > LISTED else ''}"
