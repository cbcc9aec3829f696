"""Ours beside the libraries that train spiking networks through time, on the same layers, each in a process of its own.

The network is 16C3-32C3-48C3s2-FC10 of IF neurons on constant images of 28x28, batch 128. Each library is used as its
documentation does it: SpikingJelly with batch normalisation, the others without any. Ours has weight and batch
normalisation, and the feedback of a stream besides. Peak resident memory needs a process that imports nothing else:

    python -m benchmarks.libraries WHO NUM_STEPS IMAGES REPEATS   # one row, as JSON

A library's file `benchmarks/peer_NAME.py` has `make(num_steps)`, which gives a training step: images float32 [batch,
28, 28] and labels int64 [batch] in, the loss out.
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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mpisjax_launch
from benchmarks.resident import peak_mib
from benchmarks.same_layers import Step

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "rates": "mpisjax, rates",
    "spikes": "mpisjax, spikes",
    "bptt": "mpisjax, through time",
    "snntorch": "snnTorch",
    "spikingjelly": "SpikingJelly",
    "spyx": "Spyx",
}
OURS, LIBRARIES = tuple(TITLES)[:3], tuple(TITLES)[3:]
LENGTHS = (4, 10, 30)


def missing(library: str) -> str:
    """What to say where a library is not installed; empty where it is."""
    if importlib.util.find_spec(library) is not None:
        return ""
    return f"--peer {library} needs {library}, which is not installed: pip install {library}"


def make(who: str, num_steps: int) -> Step:
    """The training step of a library, or of one of our three ways."""
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
        rows = [run("rates", lengths[0], path, repeats)]
        rows += [run(who, steps, path, repeats) for steps in lengths for who in (*OURS[1:], *libraries)]
    return beside_ours(rows)


def run(who: str, num_steps: int, images: str, repeats: int) -> dict[str, Any]:
    """A row, measured in a process of its own."""
    # Large pages are our programs' choice, and no other's.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "benchmarks.libraries", who, str(num_steps), images, str(repeats)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(who: str, num_steps: int, images: str, repeats: int) -> dict[str, Any]:
    """A row: medians over training steps after one to warm up, and the peak of memory of this process."""
    with np.load(images) as batch:
        pixels, labels = batch["images"].astype(np.float32) / 255, batch["labels"].astype(np.int64)
    step = make(who, num_steps)
    step(pixels, labels)
    wall, cpu = [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        loss = step(pixels, labels)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return {
        "who": TITLES[who],
        "T": "" if who == "rates" else num_steps,
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "peak_MiB": peak_mib(),
        "loss": loss,
    }


def beside_ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of libraries with how often they take our time, and our memory, at the same T."""
    ours = {(r["who"], r["T"]): r for r in rows}
    rates = ours[TITLES["rates"], ""]
    found = []
    for row in rows:
        more: dict[str, Any] = {}
        if not row["who"].startswith("mpisjax"):
            spikes, bptt = (ours[TITLES[who], row["T"]] for who in OURS[1:])
            more = {
                "time / rates": row["seconds"] / rates["seconds"],
                "time / spikes": row["seconds"] / spikes["seconds"],
                "time / through time": row["seconds"] / bptt["seconds"],
                "memory / spikes": row["peak_MiB"] / spikes["peak_MiB"],
            }
        found.append(row | more)
    return found


if __name__ == "__main__":
    who, steps, images, repeats = sys.argv[1:]
    if who in OURS:
        mpisjax_launch.with_large_pages()
    print(json.dumps(measure(who, int(steps), images, int(repeats))))
