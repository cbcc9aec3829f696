"""Ours beside the libraries that train spiking networks through time, on the same layers, each in a process of its own.

The network is 16C3-32C3-48C3s2-FC10 of IF neurons on constant images of 28x28, batch 128. Each library is used as its
documentation does it: SpikingJelly with batch normalisation, the others without any. Ours has weight and batch
normalisation, and the feedback of a stream besides. Peak resident memory needs a process that imports nothing else:

    python -m benchmarks.libraries WHO NUM_STEPS IMAGES REPEATS   # one row, as JSON; a goal such as 0.9 for REPEATS

A library's file `benchmarks/peer_NAME.py` has `make(num_steps)`, which gives a `benchmarks.same_layers.Learner`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mpisjax_launch
from benchmarks.resident import peak_mib
from benchmarks.same_layers import Learner

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "rates": "mpisjax, rates, 4 + 4 solver steps",
    "few": "mpisjax, rates, 3 + 1 solver steps",
    "spikes": "mpisjax, spikes",
    "bptt": "mpisjax, through time",
    "snntorch": "snnTorch",
    "spikingjelly": "SpikingJelly",
    "spyx": "Spyx",
}
OURS, LIBRARIES = tuple(TITLES)[:4], tuple(TITLES)[4:]
RATES = OURS[:2]  # without time steps
LENGTHS = (4, 10, 30)
LONGEST = 900.0  # seconds that a library has to reach an accuracy


def missing(library: str) -> str:
    """What to say where a library is not installed; empty where it is."""
    if importlib.util.find_spec(library) is not None:
        return ""
    return f"--peer {library} needs {library}, which is not installed: pip install {library}"


def make(who: str, num_steps: int) -> Learner:
    """The network of a library, or of one of our four ways, and its optimiser."""
    if who in OURS:
        from benchmarks import peer_mpisjax

        return peer_mpisjax.make(num_steps, who)
    return importlib.import_module(f"benchmarks.peer_{who}").make(num_steps)


def compare(libraries: Sequence[str], lengths: Iterable[int] = LENGTHS, repeats: int = 5) -> list[dict[str, Any]]:
    """Whole training steps and peak resident memory, ours first, with each one's ratios to ours.

    Args:
        libraries: Of `LIBRARIES`.
        lengths: Time steps; rates have none, and are measured once.
        repeats: Timed steps of each.
    """
    from benchmarks.nets import host_batch

    lengths, rows = tuple(lengths), []
    with tempfile.TemporaryDirectory() as folder:
        batch = host_batch(128)
        path = f"{folder}/batch.npz"
        np.savez(path, images=batch.images[..., 0], labels=batch.labels)
        rows = [run(who, lengths[0], path, repeats) for who in RATES]
        rows += [run(who, steps, path, repeats) for steps in lengths for who in (*OURS[2:], *libraries)]
    return beside_ours(rows)


def run(who: str, num_steps: int, images: str, asked: float) -> dict[str, Any]:
    """A row, measured in a process of its own: of `asked` timed steps or, below 1, of a training to that accuracy."""
    # Large pages are our programs' choice, and no other's.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "benchmarks.libraries", who, str(num_steps), images, str(asked)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(who: str, num_steps: int, images: str, repeats: int) -> dict[str, Any]:
    """A row: medians over training steps after one to warm up, and the peak of memory of this process."""
    with np.load(images) as batch:
        pixels, labels = batch["images"].astype(np.float32) / 255, batch["labels"].astype(np.int64)
    step = make(who, num_steps).step
    step(pixels, labels)
    wall, cpu = [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        loss = step(pixels, labels)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return {
        "who": TITLES[who],
        "T": "" if who in RATES else num_steps,
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "peak_MiB": peak_mib(),
        "loss": loss,
    }


def race(libraries: Sequence[str], data_dir: str, goal: float = 0.9, steps: int = 4) -> Iterator[dict[str, Any]]:
    """Trains each on Fashion-MNIST until it has the goal, a row as soon as it is there; ours by rates and through time.

    Args:
        libraries: Of `LIBRARIES`.
        data_dir: As of the loader section.
        goal: Accuracy on the validation split.
        steps: Time steps of training and of answers.
    """
    from benchmarks.loader import config_of
    from mpisjax.configuration import makers

    loaded = makers.make_dataset(config_of("fashion_mnist", data_dir))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.npz"
        images, held_out = (np.asarray(split.images[:])[..., 0] for split in (loaded.train, loaded.validation))
        labels, wanted = loaded.train.labels, loaded.validation.labels
        np.savez(path, images=images, labels=labels, held_out=held_out, held_out_labels=wanted)
        for who in ("rates", "bptt", *libraries):
            yield run(who, steps, path, goal)


def reach(who: str, num_steps: int, images: str, goal: float) -> dict[str, Any]:
    """A row: seconds from making the network until it has the goal, or until `LONGEST`; everything included.

    It is asked every hundred steps of 128 images. What the asking takes counts, as it does for a user.
    """
    with np.load(images) as file:
        pixels, held_out = (file[name].astype(np.float32) / 255 for name in ("images", "held_out"))
        labels, wanted = file["labels"].astype(np.int64), file["held_out_labels"]
    began = time.perf_counter()
    learner, order, accuracy, steps = make(who, num_steps), np.random.default_rng(0), 0.0, 0
    while accuracy < goal and time.perf_counter() - began < LONGEST:
        chosen = order.permutation(len(labels))
        for at in range(0, len(chosen) - 127, 128):
            batch = chosen[at : at + 128]
            learner.step(pixels[batch], labels[batch])
            steps += 1
            if steps % 100 == 0:
                parts = [learner.answer(held_out[k : k + 250]) for k in range(0, len(held_out), 250)]
                accuracy = float(np.mean(np.concatenate(parts) == wanted))
                if accuracy >= goal or time.perf_counter() - began >= LONGEST:
                    break
    return {
        "who": TITLES[who],
        "T": num_steps,
        "accuracy, %": 100 * accuracy,
        "seconds": time.perf_counter() - began,
        "steps": steps,
        "peak_MiB": peak_mib(),
    }


def beside_ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of libraries with how often they take our time, and our memory, at the same T."""
    ours = {(r["who"], r["T"]): r for r in rows}
    rates, few = (ours[TITLES[who], ""] for who in RATES)
    found = []
    for row in rows:
        more: dict[str, Any] = {}
        if not row["who"].startswith("mpisjax"):
            spikes, bptt = (ours[TITLES[who], row["T"]] for who in OURS[2:])
            more = {
                "time / rates, 4 + 4": row["seconds"] / rates["seconds"],
                "time / rates, 3 + 1": row["seconds"] / few["seconds"],
                "time / spikes": row["seconds"] / spikes["seconds"],
                "time / through time": row["seconds"] / bptt["seconds"],
                "memory / spikes": row["peak_MiB"] / spikes["peak_MiB"],
            }
        found.append(row | more)
    return found


if __name__ == "__main__":
    who, steps, images, asked = sys.argv[1:]
    if who in OURS:
        mpisjax_launch.with_large_pages()
    number = float(asked)
    found = reach(who, int(steps), images, number) if number < 1 else measure(who, int(steps), images, int(number))
    print(json.dumps(found))
