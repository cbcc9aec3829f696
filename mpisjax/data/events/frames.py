"""Events to frames, and frames that stay on disk until they are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mpisjax.data import cache
from mpisjax.data.dataset import Loaded
from mpisjax.data.events.readers import Invalid, import_tonic
from mpisjax.errors import UserError


class Binning(NamedTuple):
    """How a recording becomes frames.

    Attributes:
        num_frames: T.
        by: "time": frames of equal duration; "count": frames of equally many events.
        binary: Whether a pixel says that there was an event (0 or 1), rather than how many (up to 255).
        width: Of the sensor.
        height: Of the sensor.
        crop: The side of the square kept from the sensor's centre; 0 keeps everything.
        denoise_us: Events are dropped if no neighbour had one in the so many microseconds before; 0 drops none.
        channels: Of each pixel: two polarities, or the channels of a spike train, which has a single pixel.
    """

    num_frames: int
    by: str
    binary: bool
    width: int
    height: int
    crop: int
    denoise_us: float
    channels: int = 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a recording's frames, (T, H, W, channels)."""
        return (self.num_frames, self.crop or self.height, self.crop or self.width, self.channels)


def make_binning(
    width: int,
    height: int,
    channels: int = 2,
    *,
    num_frames: int = 30,
    frames: str = "count",
    binning: str = "time",
    crop: int = 0,
    denoise_us: float = 0.0,
) -> Binning:
    """Checks the settings of frames, by their names in `data`; `width` and `height` are 0 where they are not known yet.

    Raises:
        UserError: If one is out of range.
    """
    if binning not in ("time", "count"):
        raise UserError(f"data.binning is {binning!r}, but must be time or count")
    if frames not in ("count", "binary"):
        raise UserError(f"data.frames is {frames!r}, but must be count or binary")
    if not 1 <= num_frames <= 10_000:
        raise UserError(f"data.num_frames is {num_frames}, but must be 1 to 10000")
    if not 0 <= denoise_us < math.inf:
        raise UserError(f"data.denoise_us is {denoise_us}, but must be 0 (none) or more")
    if channels != 2 and (crop or denoise_us):
        raise UserError("data.crop and data.denoise_us are for cameras: set both to 0 for spike trains")
    made = Binning(num_frames, binning, frames == "binary", width, height, crop, float(denoise_us), channels)
    return made if not width else with_sensor(made, width, height)


def with_sensor(binning: Binning, width: int, height: int) -> Binning:
    """The same for a sensor of this size.

    Raises:
        UserError: If the crop is larger.
    """
    if not 0 <= binning.crop <= min(width, height):
        raise UserError(f"data.crop is {binning.crop}, but must be 0 (none) to {min(width, height)}")
    return binning._replace(width=width, height=height)


def count_frames(events: np.ndarray, binning: Binning) -> tuple[np.ndarray, tuple[int, int]]:
    """Sums events into frames, with tonic's slices.

    As tonic cuts a recording: by time, into T spans of floor((last - first) / T) microseconds from its first event on;
    by count, into T runs of floor(N / T) events. The few events after the last frame's end are left out.

    Args:
        events: Checked, of type `EVENT`.
        binning: How.

    Returns:
        uint8 [T, H, W, C], the last axis being the polarity (1: brighter), counts above 255 being 255; and how
        many events they were made of, after denoising, and how many of these come after the last frame's end.

    Raises:
        Invalid: If the recording is too short for T frames.
    """
    tonic = import_tonic()
    if binning.denoise_us:
        events = tonic.transforms.Denoise(filter_time=binning.denoise_us)(events)
        if not len(events):
            raise Invalid("nothing of it is left by data.denoise_us")
    if binning.by == "time":
        if events["t"][-1] - events["t"][0] < binning.num_frames:
            raise Invalid(f"it lasts less than {binning.num_frames} us, too short for {binning.num_frames} frames")
        slicer = tonic.slicers.SliceByTimeBins(bin_count=binning.num_frames)
    else:
        if len(events) < binning.num_frames:
            raise Invalid(f"it has {len(events)} events, too few for {binning.num_frames} frames")
        slicer = tonic.slicers.SliceByEventBins(bin_count=binning.num_frames)
    spans = np.array(slicer.get_slice_metadata(events, None), np.int64)
    frame = np.full(len(events), -1)
    frame[spans[0, 0] : spans[-1, 1]] = np.repeat(np.arange(binning.num_frames), spans[:, 1] - spans[:, 0])

    _, height, width, _ = binning.shape
    x = events["x"] - (binning.width - width) // 2
    y = events["y"] - (binning.height - height) // 2
    kept = (frame >= 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = (((frame * height + y) * width + x) * binning.channels + events["p"])[kept]
    counts = np.bincount(place, minlength=math.prod(binning.shape)).reshape(binning.shape)
    frames = np.minimum(counts, 1 if binning.binary else 255).astype(np.uint8)
    return frames, (len(events), int((frame < 0).sum()))


class Frames:
    """Frames of many recordings, unpacked as they are indexed.

    Binary frames are kept as bits, so that all of N-MNIST at T = 30, 32 x 32, takes 0.5 GB; they, and counts, may be a
    map of a file, of which the system keeps in memory what fits.

    Args:
        stored: uint8 [N, bytes]: bits along the last axis, first bit highest, or one byte a value.
        frame_shape: (T, H, W, 2).
        packed: Whether `stored` is bits.
        rows: Which rows of `stored` these are; None is all.

    Attributes:
        shape: (N, T, H, W, 2).
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, stored: np.ndarray, frame_shape: tuple[int, ...], packed: bool, rows: np.ndarray | None = None
    ) -> None:
        self._stored, self._frame_shape, self._packed = stored, tuple(frame_shape), packed
        self._rows = np.arange(len(stored)) if rows is None else rows
        self.shape = (len(self._rows), *self._frame_shape)

    def __len__(self) -> int:
        """The number of recordings."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The frames of one recording (uint8 [T, H, W, 2]), of an array of indices, or of a slice (with N in front)."""
        rows = self._rows[index]
        stored = np.asarray(self._stored[rows])
        if self._packed:
            stored = np.unpackbits(stored, axis=-1, count=math.prod(self._frame_shape))
        return stored.reshape(*np.shape(rows), *self._frame_shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, as an array."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def take(self, indices: np.ndarray) -> Frames:
        """Some of the recordings, still unread."""
        return Frames(self._stored, self._frame_shape, self._packed, self._rows[indices])


def stored_row(frames: np.ndarray, binary: bool) -> np.ndarray:
    """One recording's frames as a row of what `Frames` reads, uint8 [1, bytes]."""
    flat = frames.reshape(1, -1)
    return np.packbits(flat, axis=-1) if binary else flat


def store_frames(
    allocate: cache.Allocate,
    split: str,
    stream: Iterator[np.ndarray],
    labels: np.ndarray,
    binning: Binning,
    digest: Any,
) -> None:
    """Writes a split's frames and labels, and adds them to the checksum."""
    size = math.prod(binning.shape)
    shape = (len(labels), -(-size // 8) if binning.binary else size)  # bytes
    writer = allocate(f"{split}_images", shape, np.uint8)
    digest.update(f"{shape}{binning.shape}{binning.binary}".encode())
    for frames in stream:
        row = stored_row(frames, binning.binary)
        digest.update(row.data)
        writer.append(row)
    digest.update(labels.astype("<i4").data)
    allocate(f"{split}_labels", labels.shape, np.int32).append(labels)


def stored_frames(entry: cache.Entry, binning: Binning) -> Loaded:
    """What `store_frames` wrote."""
    splits: dict[str, Any] = {}
    for split in ("train", "test", "validation"):
        if f"{split}_images" in entry.arrays:
            splits[f"{split}_images"] = Frames(entry.arrays[f"{split}_images"], binning.shape, binning.binary)
            splits[f"{split}_labels"] = np.array(entry.arrays[f"{split}_labels"])
    return Loaded(**splits)
