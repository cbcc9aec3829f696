"""Folders of one's own by class as a data set: images that Pillow reads, or recordings of an event camera."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from mpisjax.data import cache
from mpisjax.data.arrays import listed, scaled
from mpisjax.data.dataset import DataSet, HoldOut, Loaded, assemble, store
from mpisjax.data.events.frames import make_binning
from mpisjax.data.events.readers import Recording
from mpisjax.data.events.recordings import Recordings, load_recordings
from mpisjax.data.files import Files, find_files, of_common_classes, refusal
from mpisjax.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
RECORDINGS = (".bin", ".aedat", ".aedat4", ".npy")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")


def from_folder(
    folder: str | Path,
    *,
    image_size: int = 32,
    fit: str = "letterbox",
    color: str = "auto",
    value_range: tuple[float, float] | None = None,
    test_share: float = 0.2,
    num_validation: int = 0,
    validation_share: float = 0.0,
    split_seed: int = 0,
    invalid: str = "refuse",
    cache_dir: str = "",
) -> DataSet:
    """Makes a data set of the images in `folder/{train,test}/CLASS`, or in `folder/CLASS`.

    A folder `val`, `valid` or `validation` beside `train` and `test` becomes the validation split; without `test` it is
    the test split. Without both, and for `folder/CLASS`, the test split is a share of each class, always the same one.

    Args:
        folder: The folder.
        image_size: Side that images are brought to, in pixels; 0: they are all alike and stay as they are.
        fit: "letterbox": the whole image on black; "crop": the largest square in its middle.
        color: "grey" or "rgb"; "auto": as the files are, which must be all grey or all in colour.
        value_range: The (lowest, highest) value of a 16-bit image, which become 0 and 255; None: 0 to 65535.
        test_share: The share of the images that becomes the test split where the folder has none.
        num_validation: Images of the train split that are held out for validation.
        validation_share: Or their share, where `num_validation` is 0.
        split_seed: Chooses the images that are held out.
        invalid: What happens to a file that cannot be used, and to a class that is in one split alone: "refuse" or
            "skip".
        cache_dir: Where decoded images are kept; empty: the user's cache folder.

    Returns:
        The data set.

    Raises:
        UserError: A file cannot be used, or a class is in one split alone; the first of them is named.
    """
    files = find_files(folder, IMAGES, test_share, invalid)
    how: dict[str, Any] = {"image_size": image_size, "fit": fit, "color": color, "value_range": value_range}

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        loaded, classes, clauses = _decode_all(files, invalid, how)
        return {"checksum": store(allocate, loaded), "classes": classes, "clauses": clauses}

    entry = cache.fetch(cache_dir, "folder", {"files": files.fingerprint(), "invalid": invalid, **how}, build)
    classes = tuple(entry.facts["classes"])
    return assemble(
        "folder",
        Loaded(**entry.arrays),
        len(classes),
        source=_sentence("images", files.folder, entry, entry.facts["clauses"], classes),
        digest=entry.facts["checksum"],
        validation=HoldOut(num_validation, validation_share, split_seed),
        classes=classes,
    )


def from_recordings(
    folder: str | Path,
    *,
    sensor_size: tuple[int, int] | None = None,
    test_share: float = 0.2,
    num_validation: int = 0,
    validation_share: float = 0.0,
    split_seed: int = 0,
    unsorted: str = "refuse",
    invalid: str = "refuse",
    cache_dir: str = "",
    **framing: Any,
) -> DataSet:
    """Makes a data set of the recordings in `folder/{train,test}/CLASS`, or in `folder/CLASS`, as frames.

    The formats are N-MNIST's `.bin`, `.aedat` (2 and 3), `.aedat4`, and `.npy` with structured arrays of x, y, t
    (microseconds) and p. Splits are made as by `from_folder`.

    Args:
        folder: The folder.
        sensor_size: (width, height) in pixels; None: the smallest that has all events.
        test_share: See `from_folder`.
        num_validation: See `from_folder`.
        validation_share: See `from_folder`.
        split_seed: See `from_folder`.
        unsorted: What happens to a recording whose time goes back: "refuse", "sort" or "skip".
        invalid: See `from_folder`.
        cache_dir: Where frames are kept; empty: the user's cache folder.
        framing: `num_frames`, `frames`, `binning`, `crop` and `denoise_us`; see
            `mpisjax.data.events.frames.make_binning`.

    Returns:
        The data set; its examples are frames [T, H, W, 2].

    Raises:
        UserError: A recording cannot be used, or a class is in one split alone.
    """
    binning = make_binning(*(sensor_size or (0, 0)), **framing)
    files = find_files(folder, RECORDINGS, test_share, invalid)
    splits = {split: [Recording(path, label) for path, label in found] for split, found in files.splits.items()}
    recordings = Recordings(files.folder, **splits)
    framed = load_recordings("recordings", recordings, binning, unsorted=unsorted, invalid=invalid, cache_dir=cache_dir)
    made = framed.binning
    sensor = f"sensor {made.width} x {made.height}{'' if sensor_size else ', found from the events'}"
    loaded = framed.loaded
    counted = {"train": loaded.train_labels, "test": loaded.test_labels, "validation": loaded.validation_labels}
    clauses = [_counts(counted), *files.how, sensor]
    if skipped := len(framed.facts["invalid"]) + len(framed.facts.get("skip", [])):
        clauses.append(f"{skipped} recordings left out")
    return assemble(
        "recordings",
        framed.loaded,
        len(files.classes),
        source=_sentence("recordings", files.folder, framed, clauses, files.classes),
        digest=framed.facts["checksum"],
        validation=HoldOut(num_validation, validation_share, split_seed),
        classes=files.classes,
    )


def _sentence(what: str, folder: Path, found: Any, clauses: Sequence[str], classes: Sequence[str]) -> str:
    clauses = [clause for clause in (*clauses, listed(classes), found.note) if clause]
    return f"{what} of {folder}: {'; '.join(clauses)}"


def _counts(splits: dict[str, Any]) -> str:
    return " and ".join(
        f"{len(found):,} {split}" for split, found in splits.items() if found is not None and len(found)
    )


def parse_sensor(text: str) -> tuple[int, int] | None:
    """The setting `data.sensor_size`, such as "346x260"; None where it is empty.

    Raises:
        UserError: It is no width and height.
    """
    if not text:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"data.sensor_size is {text!r}: give its width and height in pixels, such as 346x260")
    return int(width), int(height)


def read_image(
    path: str | Path,
    *,
    image_size: int = 32,
    fit: str = "letterbox",
    color: str = "auto",
    value_range: tuple[float, float] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads an image as `from_folder` does.

    Transparent places become black, and a photograph is turned as its camera says.

    Args:
        path: A PNG, JPEG, BMP or WebP file.
        image_size: See `from_folder`.
        fit: See `from_folder`.
        color: See `from_folder`.
        value_range: See `from_folder`.

    Returns:
        uint8 [H, W, 1] or [H, W, 3], and its (width, height) in the file.

    Raises:
        ValueError: It cannot be used; says why.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # Pillow's decoders raise what they like for a damaged file
        raise ValueError("it cannot be read as an image") from error
    size = image.size
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(scaled(np.asarray(image), value_range or (0, 65535), "it"))
    natural = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert({"auto": natural, "grey": "L", "rgb": "RGB"}[color])
    if image_size and image.size != (image_size, image_size):
        bring = ImageOps.pad if fit == "letterbox" else ImageOps.fit
        image = bring(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], -1), size


class _Decoded(NamedTuple):
    path: Path
    label: int
    pixels: np.ndarray
    size: tuple[int, int]


def _decode_all(files: Files, invalid: str, how: dict[str, Any]) -> tuple[Loaded, tuple[str, ...], list[str]]:
    """All images, the names of their classes, and what the log says of them."""
    if how["fit"] not in ("letterbox", "crop"):
        raise UserError(f"data.fit is {how['fit']!r}: choose letterbox or crop")
    if how["color"] not in ("auto", "grey", "rgb"):
        raise UserError(f"data.color is {how['color']!r}: choose auto, grey or rgb")
    unusable: list[str] = []
    splits: dict[str, list[_Decoded]] = {}

    def read(path: Path) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            return read_image(path, **how)
        except ValueError as error:
            return str(error)

    total = sum(map(len, files.splits.values()))
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=total, desc="images", disable=None if total > 2000 else True) as bar,
    ):
        for split, found in files.splits.items():
            splits[split] = []
            for (path, label), image in zip(found, pool.map(read, [path for path, _ in found]), strict=True):
                bar.update()
                if isinstance(image, str):
                    unusable.append(f"{path.relative_to(files.folder)}: {image}")
                else:
                    splits[split].append(_Decoded(path, label, *image))
    if unusable and invalid != "skip":
        raise UserError(refusal(files.folder, unusable, "replace or remove it"))
    clauses = [f"{len(unusable)} images left out ({unusable[0]})"] if unusable else []
    splits = _of_one_kind(splits, files.folder, invalid, clauses)
    if clauses:  # something was left out: classes may have gone with it
        rest = {split: [(d.path, d.label) for d in decoded] for split, decoded in splits.items()}
        left = of_common_classes(Files(files.folder, files.classes, rest, []), invalid)
        number = {name: n for n, name in enumerate(left.classes)}
        splits = {
            split: [d._replace(label=number[name]) for d in decoded if (name := files.classes[d.label]) in number]
            for split, decoded in splits.items()
        }
        files, clauses = files._replace(classes=left.classes), [*clauses, *left.how]
    arrays: dict[str, Any] = {}
    for split, decoded in splits.items():
        if decoded:
            arrays[f"{split}_images"] = np.stack([d.pixels for d in decoded])
            arrays[f"{split}_labels"] = np.array([d.label for d in decoded], np.int32)
    shape = arrays["train_images"].shape
    sizes = Counter(d.size for decoded in splits.values() for d in decoded)
    kind = "grey" if shape[-1] == 1 else "in colour"
    if how["image_size"] and set(sizes) != {shape[1:3][::-1]}:
        some = " and ".join(f"{width} x {height}" for (width, height), _ in sizes.most_common(2))
        kind += f", {'letterboxed' if how['fit'] == 'letterbox' else 'cropped'} from {some}"
        kind += f"{' and others' if len(sizes) > 2 else ''} to {shape[2]} x {shape[1]}"
    else:
        kind += f", {shape[2]} x {shape[1]}"
    return Loaded(**arrays), files.classes, [_counts(splits), kind, *files.how, *clauses]


def _of_one_kind(
    splits: dict[str, list[_Decoded]], folder: Path, invalid: str, clauses: list[str]
) -> dict[str, list[_Decoded]]:
    """Only images of the most common shape; the others are refused, or left out and told in the clauses."""
    shapes = Counter(d.pixels.shape for decoded in splits.values() for d in decoded)
    if not shapes:
        raise UserError(f"no image of {folder} can be read: give PNG, JPEG, BMP or WebP files")
    usual = shapes.most_common(1)[0][0]
    odd = [d for decoded in splits.values() for d in decoded if d.pixels.shape != usual]
    if odd:
        first = odd[0]
        name, grey = first.path.relative_to(folder), first.pixels.shape[-1] == 1
        if first.pixels.shape[-1] != usual[-1]:
            what = "grey" if grey else "in colour"
            others = f"{shapes[usual]} other images are {'in colour' if grey else 'grey'}"
            remedy = "set data.color to grey or rgb to convert all"
        else:
            what, others = f"{first.size[0]} x {first.size[1]}", f"others are {usual[1]} x {usual[0]}"
            remedy = "set data.image_size to bring all to one size"
        if invalid != "skip":
            raise UserError(
                f"{folder}/{name} is {what}, while {others}: {remedy}, or data.invalid to skip to leave it out"
            )
        clauses.append(f"{len(odd)} images left out ({name}: it is {what}, while {others})")
    return {split: [d for d in decoded if d.pixels.shape == usual] for split, decoded in splits.items()}
