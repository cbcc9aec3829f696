"""How much memory a save of a training state leaves behind, by the way in which the state is saved.

    python tests/memory_of_saves.py [--saves 60]

For each way it starts a fresh process, saves a state of 140 arrays (2 MB) so many times with orbax's
`CheckpointManager`, and prints how resident memory grew with each save, garbage collected: from the median of the
second third of the saves to that of the last. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("arrays", "arrays without OCDBT", "packed", "packed without OCDBT", "CheckpointWriter")


def resident() -> int:
    """Resident memory of this process, bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(way: str, saves: int) -> float:
    """Bytes that a save leaves behind."""
    import jax
    import orbax.checkpoint as ocp

    from mpisjax.storage import packing
    from mpisjax.storage.saving import CheckpointWriter

    keys = jax.random.split(jax.random.key(0), 140)
    state: Any = {f"a{n}": jax.random.normal(key, (3745,)) for n, key in enumerate(keys)}
    jax.block_until_ready(state)
    marks = []
    with tempfile.TemporaryDirectory() as folder:
        if way == "CheckpointWriter":
            writer = CheckpointWriter(Path(folder))
            for step in range(saves):
                writer.save(step, state, {})
                marks.append(resident())
        else:
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt="without" not in way, use_compression=False)
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            manager = ocp.CheckpointManager(folder, item_handlers=handler, options=options)
            for step in range(saves):
                saved = packing.pack(state) if way.startswith("packed") else state
                manager.save(step, args=ocp.args.PyTreeSave(saved))
                marks.append(resident())
    middle, end = marks[saves // 3 : 2 * saves // 3], marks[2 * saves // 3 :]  # until then caches fill
    return 3 * (statistics.median(end) - statistics.median(middle)) / saves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=60)
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        sys.path.insert(0, str(ROOT))  # the package may be this checkout
        print(f"{arguments.way}: {growth(arguments.way, arguments.saves) / 1000:.1f} KB a save")
    else:
        for one in WAYS:
            command = [sys.executable, __file__, "--saves", str(arguments.saves), "--way", one]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
