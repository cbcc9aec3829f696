"""The real thing: `train.py` on the digits, killed at twenty random moments, ends bit for bit as if left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from mpisjax.storage import checkpoints
from mpisjax.storage.run_folder import LOCK_NAME
from mpisjax.training.metrics import TIMING, read_rows

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
OVERRIDES = ["--config.train.epochs=32", "--config.forward.num_steps=4", "--config.train.log_every=7"]


def start(workdir: Path, cache: Path, *arguments: str) -> subprocess.Popen:
    """Starts `train.py`; what it compiles is kept in `cache`, so that starting again is quick."""
    command = [sys.executable, ROOT / "train.py", f"--workdir={workdir}", *OVERRIDES, *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cache, env=environment
    )


def crowding() -> float:
    """How many programs want each core: the ten seconds are of a machine with a core to spare."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def final(workdir: Path) -> tuple[int, dict[str, bytes], list[dict], dict]:
    """The last checkpoint's step and bits, the rows without their timing, and the results."""
    found = checkpoints.newest(workdir / checkpoints.FOLDER)
    assert found is not None
    path = found.path / checkpoints.STATE_NAME
    state = ocp.PyTreeCheckpointer().restore(path)
    bits = {"layout": json.dumps(found.layout).encode(), **{k: v.tobytes() for k, v in state.items()}}
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(workdir / "metrics.jsonl")]
    return found.step, bits, rows, json.loads((workdir / "results.json").read_text())


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    with start(tmp_path / "whole", tmp_path) as run:
        _, said = run.communicate(timeout=600)
    assert run.returncode == 0, said

    seed = time.time_ns()
    chance = random.Random(seed)
    story: list[tuple] = []
    lock = tmp_path / "killed" / LOCK_NAME
    while len(story) < KILLS:
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with start(tmp_path / "killed", tmp_path, "--config.train.checkpoint_every=2") as run:
            moment = "before the first step" if len(story) % 5 == 4 else "after the first step"
            if moment == "after the first step":
                assert run.stdout is not None
                assert "epoch" in run.stdout.readline() or len(story) > 1, "the run was over before it began"
                time.sleep(chance.uniform(0.0, 4.0))
            else:
                while not lock.exists() or lock.read_text() != f"process {run.pid} on {socket.gethostname()}\n":
                    time.sleep(0.01)
                time.sleep(chance.uniform(0.0, 2.0))
            asked = time.monotonic()
            run.send_signal(number)
            _, said = run.communicate(timeout=60)
        waited = time.monotonic() - asked
        step = checkpoints.steps(tmp_path / "killed" / checkpoints.FOLDER)[-1:]
        story.append((number.name, moment, run.returncode, round(waited, 2), step))
        print(*story[-1], f"({crowding():.1f} programs a core)", flush=True)
        if number == signal.SIGKILL:
            assert run.returncode == -signal.SIGKILL, story
        else:
            assert run.returncode == 0 and waited < 10 * crowding(), (seed, story, said)
    with start(tmp_path / "killed", tmp_path, "--config.train.checkpoint_every=2") as run:
        _, said = run.communicate(timeout=600)
    assert run.returncode == 0, said

    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert killed[0] == whole[0]
    assert [key for key in whole[1] if killed[1][key] != whole[1][key]] == [], (seed, story)
    assert killed[2:] == whole[2:], (seed, story)
