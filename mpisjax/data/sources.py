"""A data set by its name, from TFDS's prepared data, files or a download."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mpisjax.data import arrays, cache, digits, fetch, folders, images, prepared
from mpisjax.data.dataset import DataSet, HoldOut, Loaded, assemble, store
from mpisjax.data.events import saccades
from mpisjax.data.events.frames import make_binning
from mpisjax.data.events.recordings import Framed, Recordings, load_recordings
from mpisjax.data.events.sets import CIFAR10_CLASSES, EVENT_SETS, KnownSet
from mpisjax.errors import UserError
from mpisjax.paths import cache_folder, expand

DIGITS = tuple("0123456789")
CIFAR100_CLASSES = (
    "apple", "aquarium fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple tree", "motorcycle", "mountain", "mouse", "mushroom", "oak tree", "orange",
    "orchid", "otter", "palm tree", "pear", "pickup truck", "pine tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow tree", "wolf", "woman", "worm",
)  # fmt: skip
_IDX = ", ".join(f"{stem}.gz" for stem in images.IDX_FILES.values())
IMAGE_SETS = {
    "mnist": KnownSet((28, 28, 1), 10, 60_000, 10_000, _IDX, images.find_idx, DIGITS),
    "fashion_mnist": KnownSet(
        (28, 28, 1), 10, 60_000, 10_000, _IDX, images.find_idx,
        ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": KnownSet(
        (32, 32, 3), 10, 50_000, 10_000, "cifar-10-binary.tar.gz", partial(images.find_cifar, "cifar10"),
        CIFAR10_CLASSES,
    ),
    "cifar100": KnownSet(
        (32, 32, 3), 100, 50_000, 10_000, "cifar-100-binary.tar.gz", partial(images.find_cifar, "cifar100"),
        CIFAR100_CLASSES,
    ),
}  # fmt: skip
SETS = {**IMAGE_SETS, **EVENT_SETS}
EMBEDDED = ("digits", "saccade_digits")
OWN = ("folder", "arrays", "recordings")
NAMES = (*EMBEDDED, *SETS, *OWN)


def load(
    name: str,
    *,
    dir: str | os.PathLike[str] = "",
    cache_dir: str | os.PathLike[str] = "",
    source: str = "auto",
    num_validation: int = 0,
    validation_share: float = 0.0,
    split_seed: int = 0,
    test_share: float = 0.2,
    invalid: str = "refuse",
    image_size: int = 32,
    fit: str = "letterbox",
    color: str = "auto",
    value_range: tuple[float, float] | None = None,
    sensor_size: tuple[int, int] | None = None,
    crop: int = 0,
    num_frames: int = 30,
    steps_per_frame: int = 1,
    frames: str = "count",
    binning: str = "time",
    denoise_us: float = 0.0,
    unsorted_events: str = "refuse",
) -> DataSet:
    """Loads a data set by its name. The arguments are the settings of `data`.

    Args:
        name: One of `NAMES`.
        dir: The folder with the set's files, or one's own data; empty: TFDS's prepared data or a download.
        cache_dir: The folder for decoded arrays; empty: the user's cache folder.
        source: "auto", "tfds", "files" or "download".
        num_validation: Examples of the train split that are held out.
        validation_share: Or their share, where `num_validation` is 0.
        split_seed: Chooses them.
        test_share: One's own data without a test split: the share that becomes it.
        invalid: What happens to files and recordings that cannot be used, "refuse" or "skip".
        image_size: "folder": the side in pixels that images are brought to; 0: as they are.
        fit: "folder": "letterbox" or "crop".
        color: "folder": "auto", "grey" or "rgb".
        value_range: "arrays" and 16-bit images: the lowest and the highest number; None: bytes.
        sensor_size: "recordings": width and height in pixels; None: found from the events.
        crop: Events: the side of the centre crop in pixels; 0: none.
        num_frames: Events: frames a recording.
        steps_per_frame: Events: steps of the simulation that each frame drives.
        frames: Events: "count" or "binary".
        binning: Events: frames of equal "time", or of equal event "count".
        denoise_us: Events: drops events without a neighbour for so many microseconds; 0: none.
        unsorted_events: Events: what happens to a recording whose time goes back, "refuse", "sort" or "skip".

    Returns:
        The data set.

    Raises:
        UserError: If a setting is wrong, or the data is missing or damaged.
    """
    dir, cache_dir = os.fspath(dir), os.fspath(cache_dir)
    place, held = Place(name, dir, cache_dir, source), HoldOut(num_validation, validation_share, split_seed)
    if name not in NAMES:
        raise UserError(f"data.name is {name!r}, but must be one of {', '.join(NAMES)}")
    if name not in ("saccade_digits", *EVENT_SETS, "recordings") and (crop or denoise_us):
        raise UserError(f"data.crop and data.denoise_us are for event sets: set both to 0 for {name}")
    if name in EMBEDDED and dir:
        raise UserError(
            f"data.dir is {dir!r}, but data.name is {name!r}, which comes with scikit-learn and reads no files: "
            + _OTHER_NAMES
        )
    if name in OWN and not dir:
        raise UserError(f"data.name is {name!r}, but data.dir is empty: set it to your {_OWN_FILES[name]}")
    framing: dict[str, Any] = {"num_frames": num_frames, "frames": frames, "binning": binning}
    framing |= {"crop": crop, "denoise_us": denoise_us}
    own: dict[str, Any] = {"num_validation": num_validation, "validation_share": validation_share}
    own |= {"split_seed": split_seed, "test_share": test_share, "invalid": invalid}
    if name == "recordings":
        own |= {"sensor_size": sensor_size, "unsorted": unsorted_events, "cache_dir": cache_dir}
        dataset = folders.from_recordings(dir, **own, **framing)
    elif name == "arrays":
        dataset = arrays.from_file(dir, value_range=value_range, **own)
    elif name == "folder":
        own |= {"image_size": image_size, "fit": fit, "color": color, "cache_dir": cache_dir}
        dataset = folders.from_folder(dir, value_range=value_range, **own)
    elif name == "digits":
        # Kept in the cache, since importing scikit-learn takes about a second.
        loaded, digest, note = _kept(place, {"scikit-learn": version("scikit-learn")}, digits.load)
        dataset = assemble(
            name, loaded, 10, source=digits.SENTENCE + note, digest=digest, validation=held, classes=DIGITS
        )
    elif name == "saccade_digits":
        binned = make_binning(saccades.SENSOR_SIZE, saccades.SENSOR_SIZE, **framing)
        dataset = _of_frames(name, saccades.load_saccades(binned, cache_dir), 10, DIGITS, saccades.SENTENCE, held)
    elif name in IMAGE_SETS:
        dataset = _load_images(place, held)
    else:
        dataset = _load_events(place, held, framing, {"unsorted": unsorted_events, "invalid": invalid})
    return replace(dataset, steps_per_frame=steps_per_frame)


_OTHER_NAMES = (
    "for images in DIR/CLASS set data.name to folder (--config folder has settings for them), for event files there to"
    " recordings, for an .npz file to arrays, or leave data.dir out"
)
_OWN_FILES = {
    "folder": "folder of images in train/CLASS and test/CLASS, or in CLASS",
    "arrays": ".npz file with x_train, y_train, x_test and y_test",
    "recordings": "folder of event files in train/CLASS and test/CLASS, or in CLASS",
}


def _load_images(place: Place, held: HoldOut) -> DataSet:
    found, where = _first(place, {"tfds": _prepared, "files": _files, "download": _download})
    known = IMAGE_SETS[place.name]
    loaded, digest, note = _kept(place, {"fingerprint": found.fingerprint()}, found.read)
    sentence = f"{place.name}, {where}, {completeness(loaded, known)}{note}"
    return assemble(
        place.name,
        loaded,
        known.num_classes,
        source=sentence,
        digest=digest,
        validation=held,
        classes=known.classes,
    )


def _kept(place: Place, key: dict[str, Any], read: Callable[[], Loaded]) -> tuple[Loaded, str, str]:
    """What `read` gives, from the cache; its checksum; and the end of a sentence that says why it could not be kept."""
    entry = cache.fetch(place.cache_dir, place.name, key, lambda allocate: {"checksum": store(allocate, read())})
    return Loaded(**entry.arrays), entry.facts["checksum"], entry.note and f"; {entry.note}"


def _load_events(place: Place, held: HoldOut, framing: dict[str, Any], choices: dict[str, str]) -> DataSet:
    known = EVENT_SETS[place.name]
    height, width, channels = known.size
    found, where = _first(place, {"files": _files, "download": _download})  # TFDS does not have them
    binned = make_binning(width, height, channels, **framing)
    framed = load_recordings(place.name, found, binned, **choices, cache_dir=place.cache_dir)
    sentence = f"{place.name}, {where}, {completeness(framed.loaded, known, ' recordings')}"
    return _of_frames(place.name, framed, known.num_classes, known.classes, sentence, held)


def _of_frames(
    name: str, framed: Framed, num_classes: int, classes: tuple[str, ...], sentence: str, held: HoldOut
) -> DataSet:
    sentence += framed.note and f"; {framed.note}"
    digest = framed.facts["checksum"]
    return assemble(name, framed.loaded, num_classes, source=sentence, digest=digest, validation=held, classes=classes)


def completeness(loaded: Loaded, known: KnownSet, what: str = "") -> str:
    """Says how many examples there are, and whether these are all."""
    have = f"{len(loaded.train_labels):,} train and {len(loaded.test_labels):,} test{what}"
    if (len(loaded.train_labels), len(loaded.test_labels)) == (known.num_train, known.num_test):
        return f"complete: {have}"
    return f"a SUBSET: {have} of {known.num_train:,} and {known.num_test:,}"


class Place(NamedTuple):
    """Where to look for a set.

    Attributes:
        name: The set.
        dir: The folder with its files, and the only one that is looked into; empty: the usual ones, and a download.
        cache_dir: The cache, where downloads are kept too; empty for the user's.
        source: "auto", "tfds", "files" or "download".
    """

    name: str
    dir: str
    cache_dir: str
    source: str


class Missing(Exception):
    """A place has no such data; says which place."""


def _first(place: Place, finders: dict[str, Callable[[Place], tuple[Any, str]]]) -> tuple[Any, str]:
    """What was found at the first place that has the set, and where, for people; with `data.dir` there is no other.

    Raises:
        UserError: If none has.
    """
    if place.source != "auto" and place.source not in finders:
        raise UserError(f"data.source is {place.source!r}, but for {place.name} must be auto, {', '.join(finders)}")
    if place.dir and place.source == "download":
        raise UserError(
            f"data.source is 'download', which does not read data.dir, {place.dir!r}: leave one of them out"
        )
    if place.dir and not Path(expand(place.dir)).is_dir():
        there = "that is no folder" if Path(expand(place.dir)).exists() else "there is no such folder"
        raise UserError(f"data.dir is {place.dir!r}, but {there}: " + _OTHER_NAMES)
    reasons = []
    kinds = [kind for kind in finders if kind != "download" or not place.dir]  # a folder was named: no other will do
    for kind in kinds if place.source == "auto" else [place.source]:
        try:
            return finders[kind](place)
        except Missing as missing:
            reasons.append(str(missing))
    remedy = f"put {SETS[place.name].wanted} into {_folders(place)[0]}"
    remedy += f", or {_OTHER_NAMES}" if place.dir else ", or set data.dir to their folder"
    raise UserError(f"{place.name} was not found: {'; '.join(reasons)}; {remedy}")


def downloads_folder(place: Place) -> Path:
    """Where downloads are kept."""
    base = Path(expand(place.cache_dir)) if place.cache_dir else cache_folder()
    return base / "downloads"


def _folders(place: Place) -> list[Path]:
    """Where files are looked for: `data.dir` and its subfolder of the set's name, else beside the downloads."""
    if place.dir:
        base = Path(expand(place.dir))
        return [base, base / place.name]
    return [downloads_folder(place) / place.name]


def _prepared(place: Place) -> tuple[images.Found, str]:
    folder = prepared.find(place.name, place.dir)
    if folder is None:
        raise Missing("TFDS has not prepared it")
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise Missing(f"TFDS has prepared it in {folder}, but is not installed to read it")
    known = IMAGE_SETS[place.name]
    read = partial(prepared.load, folder, known.size, known.num_classes)
    return images.Found(folder, partial(prepared.fingerprint, folder), read), f"prepared by TFDS in {folder}"


def _files(place: Place) -> tuple[images.Found | Recordings, str]:
    what, folders = ("recordings" if place.name in EVENT_SETS else "files"), _folders(place)
    # Event sets are unpacked into the folder of downloads itself.
    for folder in folders if place.dir or place.name in IMAGE_SETS else (*folders, downloads_folder(place)):
        if found := SETS[place.name].find(folder):
            return found, f"{what} in {found.folder}"
    raise Missing(f"its {what} are not in {' or '.join(map(str, folders))}")


def _download(place: Place) -> tuple[images.Found | Recordings, str]:
    folder = downloads_folder(place)
    try:
        if place.name in EVENT_SETS:
            fetch.download_events(place.name, folder)
        else:
            folder = folder / place.name
            fetch.download(place.name, folder)
    except UserError as error:
        raise Missing(str(error)) from error
    found = SETS[place.name].find(folder)
    if found is None:
        raise Missing(f"what was downloaded to {folder} is not the set")
    return found, f"downloaded to {found.folder}"
