"""Recordings of event cameras: how each format is read, and what makes a recording invalid.

Every reader gives the same structured array, `EVENT`: column x, row y, time t in microseconds, polarity p (1:
brighter).
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpisjax.errors import UserError

EVENT = np.dtype([("x", np.int32), ("y", np.int32), ("t", np.int64), ("p", np.int32)])
MAX_BYTES = 1 << 30  # of a file; the largest of DVS128 Gesture has about 100 MB
MAX_OVERFLOWS = 1024  # of N-MNIST's 8 ms clock; a recording of 0.3 s has none


class Invalid(Exception):
    """A recording that must not be used; says why."""


class Unsorted(Invalid):
    """A recording whose time goes back."""


class Recording(NamedTuple):
    """Where one labelled recording is.

    Attributes:
        path: Its file.
        label: Its class.
        window: (first, last) time in microseconds, for files with many recordings; None is the whole file.
        number: Of the recording, in an HDF5 file of many spike trains.
    """

    path: Path
    label: int
    window: tuple[int, int] | None = None
    number: int | None = None

    def named(self, folder: Path) -> str:
        """What to call it in a message."""
        which = "" if self.number is None else f" recording {self.number}"
        return f"{self.path.relative_to(folder)}{which}"


def import_tonic() -> Any:
    """Tonic, when it is needed: it is slow to import.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import tonic
    except ImportError as error:
        raise UserError(f"event data needs tonic ({error}): pip install tonic h5py") from error
    return tonic


def check(events: np.ndarray, width: int, height: int, sort: bool = False, channels: int = 2) -> np.ndarray:
    """Makes sure of what every recording must satisfy.

    Args:
        events: Of any structured type with x, y, t and p.
        width: Of the sensor.
        height: Of the sensor.
        sort: Whether to sort events that are out of order, stably by time, rather than refuse them.
        channels: Polarities are below it.

    Returns:
        The events as `EVENT`, in time order.

    Raises:
        Invalid: If there is no event, one lies outside of the sensor, has no polarity, or time goes back.
    """
    if not len(events):
        raise Invalid("it holds no event")
    x, y, t, p = (np.asarray(events[name]).astype(np.int64) for name in ("x", "y", "t", "p"))
    outside = np.flatnonzero((x < 0) | (x >= width) | (y < 0) | (y >= height))
    if len(outside):
        first = outside[0]
        raise Invalid(f"event {first} lies at ({x[first]}, {y[first]}), outside of the {width} x {height} sensor")
    if ((p < 0) | (p >= channels)).any():
        known = "polarities other than 0 and 1" if channels == 2 else f"channels outside of 0 to {channels - 1}"
        raise Invalid(f"it holds {known}")
    back = np.flatnonzero(np.diff(t) < 0)
    if len(back) and sort:
        order = np.argsort(t, kind="stable")
        x, y, t, p = x[order], y[order], t[order], p[order]
    elif len(back):
        raise Unsorted(f"time goes back from {t[back[0]]} to {t[back[0] + 1]} us at event {back[0] + 1}")
    if t[0] < 0:
        raise Invalid(f"its first event is at {t[0]} us, before time 0")
    checked = np.empty(len(x), EVENT)
    checked["x"], checked["y"], checked["t"], checked["p"] = x, y, t, p
    return checked


def parse_nmnist(content: bytes) -> np.ndarray:
    """N-MNIST's `.bin`, by tonic: five bytes an event; x, y, then the polarity's bit and 23 bits of microseconds.

    Raises:
        Invalid: If the file is truncated.
    """
    if len(content) % 5:
        raise Invalid(f"it is truncated: {len(content)} bytes are no whole number of 5-byte events")
    if content[1::5].count(240) > MAX_OVERFLOWS:  # markers, which tonic takes quadratic time for
        raise Invalid(f"it holds more than {MAX_OVERFLOWS} overflows of its clock")
    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    return import_tonic().io.read_mnist_file(io.BytesIO(content), dtype, is_stream=True)


def parse_array(content: bytes) -> np.ndarray:
    """A `.npy`: one's own structured array, or DVS128 Gesture as tonic distributes it.

    A structured array has the fields x, y, t (microseconds) and p; others are ignored. Tonic's has rows (x, y,
    polarity, milliseconds).

    Raises:
        Invalid: If it is no such array.
    """
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # also zipfile's and tokenize's own, for what only looks like an array
        why = str(error)[:100] if isinstance(error, ValueError | OSError | EOFError) else type(error).__name__
        raise Invalid(f"it is no array that NumPy can read ({' '.join(why.split())})") from error
    if isinstance(array, np.ndarray) and array.ndim == 1 and set("xytp") <= set(array.dtype.names or ()):
        columns, unit = [array[name] for name in "xypt"], 1
    elif isinstance(array, np.ndarray) and array.ndim == 2 and array.shape[1] == 4:
        columns, unit = list(array.T), 1000
    else:
        raise Invalid("it is no array of N rows (x, y, polarity, milliseconds), and has no fields x, y, t and p")
    events = np.empty(len(array), EVENT)
    for name, column in zip("xypt", columns, strict=True):
        if column.dtype.kind not in "iufb" or column.ndim != 1:
            raise Invalid(f"its {name} are no numbers")
        if not np.isfinite(column).all() or (np.abs(column.astype(np.float64)) > 2**50).any():
            raise Invalid("it holds numbers that are no times or coordinates")
        if name != "t":
            events[name] = np.clip(column.astype(np.int64), -1, 1 << 20)  # so that nothing wraps around
    events["t"] = columns[3].astype(np.int64) * unit
    return events


def _after_header(content: bytes) -> int:
    """Where the data begins: after the lines that start with `#`."""
    position = 0
    while content[position : position + 1] == b"#":
        end = content.find(b"\n", position)
        if end < 0:
            raise Invalid("it is truncated within its header")
        line = content[position:end].strip()
        position = end + 1
        if line == b"#!END-HEADER":
            break
    return position


def parse_aedat2(content: bytes) -> np.ndarray:
    """CIFAR10-DVS as its authors distribute it: AEDAT 2.0 of a DVS128, pairs of big-endian (address, microseconds).

    The address holds the polarity (0 is brighter) in bit 0, and the pixel in bits 1..7 and 8..14, both counted from the
    far side. Bit 15 marks what is no pixel's event; those are left out.

    Raises:
        Invalid: If the file is truncated, or an address is longer than 16 bits.
    """
    if not content.startswith(b"#!AER-DAT2"):
        raise Invalid("it does not begin with #!AER-DAT2")
    start = _after_header(content)
    if (len(content) - start) % 8:
        raise Invalid("it is truncated: its data is no whole number of 8-byte events")
    address, time = np.frombuffer(content, ">u4", offset=start).reshape(-1, 2).astype(np.int64).T
    if (address >> 16).any():
        raise Invalid("it holds addresses of more than 16 bits, so it is not from a DVS128")
    pixel = (address >> 15) == 0
    address, time = address[pixel], time[pixel]
    events = np.empty(len(address), EVENT)
    events["x"], events["y"] = 127 - (address >> 8 & 127), 127 - (address >> 1 & 127)
    events["t"], events["p"] = time, 1 - (address & 1)
    return events


def parse_aedat3(content: bytes) -> np.ndarray:
    """DVS128 Gesture as its authors distribute it: AEDAT 3.1, packets of events behind 28-byte headers.

    Polarity events (type 1) are a 32-bit word - bit 0: valid, bit 1: polarity, bits 2..16: y, bits 17..31: x - and 32
    bits of microseconds, which a packet's overflow count extends. Packets of other types are skipped.

    Raises:
        Invalid: If the file is truncated, or a packet's sizes contradict each other.
    """
    if not content.startswith(b"#!AER-DAT3.1"):
        raise Invalid("it does not begin with #!AER-DAT3.1")
    position, packets = _after_header(content), []
    while position < len(content):
        header = content[position : position + 28]
        if len(header) < 28:
            raise Invalid("it is truncated within a packet's header")
        kind = int.from_bytes(header[:2], "little")
        size, _, overflow, capacity, number, _ = np.frombuffer(header, "<u4", 6, 4).tolist()
        position += 28
        end = position + size * capacity
        if end > len(content) or number > capacity or not size:
            raise Invalid("it is truncated within a packet, or a packet's header is wrong")
        if kind == 1:
            if size != 8:
                raise Invalid("it holds polarity events of another size than 8 bytes")
            pairs = np.frombuffer(content, "<u4", 2 * number, position).reshape(-1, 2).astype(np.int64)
            packets.append(np.column_stack([pairs[:, 0], pairs[:, 1] + (overflow << 31)])[(pairs[:, 0] & 1) == 1])
        position = end
    word, time = np.concatenate(packets).T if packets else np.empty((2, 0), np.int64)
    events = np.empty(len(word), EVENT)
    events["x"], events["y"] = word >> 17 & 0x7FFF, word >> 2 & 0x7FFF
    events["t"], events["p"] = time, word >> 1 & 1
    return events


def read_aedat4(path: Path) -> np.ndarray:
    """CIFAR10-DVS as tonic distributes it: AEDAT 4, by tonic and the `aedat` package.

    Raises:
        Invalid: If it cannot be decoded.
        UserError: If the `aedat` package is not installed.
    """
    try:
        events = import_tonic().io.read_aedat4(str(path)).copy()
    except ImportError as error:
        raise UserError(f"{path.name} is in AEDAT 4, which needs one more package: pip install aedat") from error
    except UserError:  # no tonic
        raise
    except Exception as error:  # the decoder and tonic raise what they like for a damaged file
        raise Invalid(f"it cannot be decoded ({str(error)[:100] or type(error).__name__})") from error
    events.dtype.names = ("t", "x", "y", "p")
    return events


def open_spike_trains(path: Path) -> Any:
    """Opens an HDF5 file of spike trains, in the format of SHD and SSC (B. Cramer et al., 2020).

    `spikes/times` (seconds) and `spikes/units` hold an array for each recording, `labels` its class.

    Raises:
        UserError: If it cannot be read, or h5py is not installed.
    """
    import_tonic()
    import h5py  # which tonic needs, too

    try:
        file = h5py.File(path, "r")
        sizes = {len(file[key]) for key in ("spikes/times", "spikes/units", "labels")}
    except Exception as error:  # h5py raises what it likes for a damaged file
        raise UserError(
            f"{path} cannot be read as HDF5 with spikes/times, spikes/units and labels: fetch it again"
        ) from error
    if len(sizes) != 1:
        raise UserError(f"{path} has {sorted(sizes)} times, units and labels: fetch it again")
    return file


_spike_trains = functools.lru_cache(maxsize=1)(open_spike_trains)


def read_spike_train(path: Path, index: int) -> np.ndarray:
    """One recording of SHD or SSC: each unit is a channel (`p`) of a sensor of one pixel.

    Raises:
        Invalid: If it cannot be read, or times and units are not of one length.
    """
    try:
        file = _spike_trains(path)
        times = file["spikes/times"][index].astype(np.float64)
        units = file["spikes/units"][index].astype(np.int64)
    except Exception as error:
        raise Invalid(f"it cannot be read ({str(error)[:100]})") from error
    if times.shape != units.shape or times.ndim != 1 or not np.isfinite(times).all() or (np.abs(times) > 1e6).any():
        raise Invalid("its times are no seconds, or not as many as its units")
    events = np.zeros(len(times), EVENT)
    events["t"], events["p"] = times * 1e6, units
    return events


@functools.lru_cache(maxsize=1)
def _whole(path: Path, width: int, height: int, sort: bool, channels: int) -> np.ndarray:
    """All events of a file; the last file is remembered, for those that hold a dozen recordings."""
    suffix = path.suffix.lower()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Invalid(f"it is larger than {MAX_BYTES >> 20} MiB")
        content = b"" if suffix == ".aedat4" else path.read_bytes()
    except OSError as error:
        raise Invalid(f"it cannot be read: {error.strerror or error}") from error
    if suffix == ".aedat4":
        events = read_aedat4(path)
    elif suffix == ".bin":
        events = parse_nmnist(content)
    elif suffix == ".npy":
        events = parse_array(content)
    else:
        events = parse_aedat3(content) if content.startswith(b"#!AER-DAT3") else parse_aedat2(content)
    return check(events, width, height, sort, channels)


def forget() -> None:
    """Forgets the files that were read last: they may have changed."""
    _whole.cache_clear()
    _spike_trains.cache_clear()


def read(recording: Recording, width: int, height: int, sort: bool = False, channels: int = 2) -> np.ndarray:
    """The events of a recording, checked.

    Args:
        recording: Where it is.
        width: Of the sensor.
        height: Of the sensor.
        sort: Whether to sort events that are out of order.
        channels: Of each pixel: two polarities, or the channels of a spike train.

    Returns:
        Events of type `EVENT`, in time order.

    Raises:
        Invalid: If the recording must not be used.
    """
    if recording.number is not None:
        return check(read_spike_train(recording.path, recording.number), width, height, sort, channels)
    events = _whole(recording.path, width, height, sort, channels)
    if recording.window is not None:
        first, last = np.searchsorted(events["t"], recording.window)
        events = events[first:last]
        if not len(events):
            raise Invalid(f"it holds no event between {recording.window[0]} and {recording.window[1]} us")
    return events
