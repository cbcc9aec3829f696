"""Scikit-learn's digits as an event camera would see them: an event set that needs no download.

The camera follows N-MNIST (G. Orchard, A. Jayawant, G. Cohen and N. Thakor, "Converting static image datasets to
spiking neuromorphic datasets using saccades", 2015): three saccades of 105 ms each along a triangle, by (+3.5, +7),
(+3.5, -7) and (-7, 0) pixels. Each pixel of its 34 x 34 sensor remembers a log-intensity. It gives an event whenever
the intensity has changed by a threshold, which differs a little from pixel to pixel; noise adds events without a cause.
Linear interpolation between pixel centres magnifies the digits three times, to 24 x 24 within a dark canvas. That
leaves 5 pixels on each side for the motion of 3.5 to either side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpisjax.data import cache, digits
from mpisjax.data.events.frames import Binning, store_frames, stored_frames
from mpisjax.data.events.readers import EVENT
from mpisjax.data.events.recordings import Framed, counted, report

SENSOR_SIZE = 34
MAGNIFICATION = 3
SACCADE_US = 105_000
STEPS = 35  # of simulation, in each saccade: the picture moves at most 0.2 pixels in one
CORNERS = np.array([[-3.5, -3.5], [0.0, 3.5], [3.5, -3.5], [-3.5, -3.5]])  # (x, y) of the picture, in pixels
DARK = 0.1  # of the brightest intensity: what the screen gives off where the digit is black
THRESHOLD = 0.5  # of log-intensity; about 4,000 events a digit, as N-MNIST has
MISMATCH = 0.03  # standard deviation of the thresholds
NOISE_HZ = 0.5  # events of each pixel without any cause
CHUNK = 200  # digits simulated at a time
SENTENCE = "saccade_digits, scikit-learn's digits seen by a simulated event camera, complete: 1,437 train and 360 test"


def load_saccades(binning: Binning, cache_dir: str) -> Framed:
    """The digits as the camera sees them, as frames; cached.

    Args:
        binning: How events become frames, for a sensor of `SENSOR_SIZE`.
        cache_dir: The cache's folder; empty for the user's.
    """
    images = digits.load_images()

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        digest, first, tally = hashlib.sha256(), 0, [0, 0]
        for split, (pictures, labels) in zip(("train", "test"), images, strict=True):
            stream = (counted(events, binning, tally) for events in events_of(pictures, first=first))
            store_frames(allocate, split, stream, labels, binning, digest)
            first += len(labels)
        return {"checksum": digest.hexdigest(), "tally": tally}

    entry = cache.fetch(cache_dir, "saccade_digits", {"binning": list(binning)}, build)
    report("saccade_digits", entry.facts)
    return Framed(stored_frames(entry, binning), binning, entry.facts, entry.note)


def events_of(images: np.ndarray, seed: int = 0, first: int = 0) -> Iterator[np.ndarray]:
    """Simulates the camera.

    Args:
        images: Intensities in 0..1 [N, 8, 8].
        seed: Of the camera's imperfections and noise.
        first: The number of the first image; each image's noise depends on (seed, its number) alone.

    Yields:
        The events of each image, of type `EVENT`, in time order, about 0 to 315,000 us.
    """
    mismatch = np.random.Generator(np.random.Philox(key=[seed, 0])).standard_normal((SENSOR_SIZE, SENSOR_SIZE))
    threshold = np.round(THRESHOLD * (1 + MISMATCH * mismatch), 6)
    for start in range(0, len(images), CHUNK):
        chunk = _simulate(images[start : start + CHUNK], threshold)
        for offset, events in enumerate(chunk):
            noise = _noise(np.random.Generator(np.random.Philox(key=[seed, 1 + first + start + offset])))
            both = np.concatenate([events, noise])
            yield both[np.lexsort((both["p"], both["x"], both["y"], both["t"]))]


def _interpolation(shift: float) -> np.ndarray:
    """Weights [34, 8] from the digit's pixels to the sensor's, the picture being shifted by so many sensor pixels."""
    place = (np.arange(SENSOR_SIZE) - (SENSOR_SIZE - 1) / 2 - shift) / MAGNIFICATION + 3.5
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(8)))


def _log_intensity(images: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[N, 34, 34], rounded so that no difference between processors' arithmetic can move an event."""
    light = _interpolation(position[1]) @ images @ _interpolation(position[0]).T
    return np.round(np.log(DARK + np.round(light, 9)), 9)


def _simulate(images: np.ndarray, threshold: np.ndarray) -> list[np.ndarray]:
    before = _log_intensity(images, CORNERS[0])
    memory = before.copy()
    found = []
    for step in range(1, 3 * STEPS + 1):
        leg, part = divmod(step - 1, STEPS)
        position = CORNERS[leg] + (CORNERS[leg + 1] - CORNERS[leg]) * ((part + 1) / STEPS)
        now = _log_intensity(images, position)
        crossings = np.trunc((now - memory) / threshold).astype(np.int64)
        sample, y, x = np.nonzero(crossings)
        count = crossings[sample, y, x]
        sign = np.sign(count)
        repeat = np.abs(count)
        owner = np.repeat(np.arange(len(count)), repeat)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(repeat) - repeat, repeat) + 1
        sample, y, x, sign = sample[owner], y[owner], x[owner], sign[owner]
        # When, within the step, the log-intensity crossed the level, if it changed evenly.
        level = memory[sample, y, x] + sign * nth * threshold[y, x]
        share = (level - before[sample, y, x]) / (now - before)[sample, y, x]
        time = (step - 1 + np.clip(share, 0, 1)) * (SACCADE_US / STEPS)
        events = np.empty(len(owner), EVENT)
        events["x"], events["y"], events["p"] = x, y, sign > 0
        events["t"] = np.round(time, 3).astype(np.int64)
        found.append((sample, events))
        memory += crossings * threshold
        before = now
    sample = np.concatenate([numbers for numbers, _ in found])
    events = np.concatenate([part for _, part in found])
    order = np.argsort(sample, kind="stable")
    return np.split(events[order], np.searchsorted(sample[order], np.arange(1, len(images))))


def _noise(random: np.random.Generator) -> np.ndarray:
    """Events without cause, as many in each second on each pixel as `NOISE_HZ` says."""
    duration = 3 * SACCADE_US
    expected = NOISE_HZ * SENSOR_SIZE * SENSOR_SIZE * duration / 1e6
    events = np.empty(random.poisson(expected), EVENT)
    for name, end in (("x", SENSOR_SIZE), ("y", SENSOR_SIZE), ("t", duration), ("p", 2)):
        events[name] = random.integers(0, end, len(events))
    return events
