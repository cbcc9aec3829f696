"""Runs in processes of their own, ended by signals at random moments and started again with the same command."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpisjax.storage import checkpoints, packing
from mpisjax.training.metrics import TIMING, read_rows

EPOCHS = 6
SCRIPT = Path(__file__).with_name("tiny.py")
ROOT = SCRIPT.parents[2]


def start(workdir: Path, *arguments: str) -> subprocess.Popen:
    """Starts the tiny run with a checkpoint after every step, so that it is nearly always writing one."""
    command = [sys.executable, SCRIPT, "--workdir", workdir, f"--config.train.epochs={EPOCHS}"]
    command += ["--config.train.checkpoint_every=1", "--config.train.log_every=4", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def final(workdir: Path):
    """The last checkpoint's bits, and the rows without their timing."""
    found = checkpoints.newest(workdir / checkpoints.FOLDER)
    state = checkpoints.restore(found, tiny.init_state(tiny.get_config()))
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(workdir / "metrics.jsonl")]
    arrays = jax.tree.leaves(packing.without_keys(state)[1])
    return found.step, [np.asarray(array).tobytes() for array in arrays], rows


@pytest.mark.slow
def test_killed_at_random_and_started_again(tmp_path):
    config = tiny.get_config()
    config.train.epochs = EPOCHS
    tiny.fit(tmp_path / "whole", config)

    chance = random.Random(time.time_ns())
    kills = []
    for number in (signal.SIGKILL, signal.SIGINT):
        with start(tmp_path / "killed") as run:
            assert run.stdout.readline(), run.stderr.read()  # the first step has been taken
            delay = chance.uniform(0.0, 0.4)
            time.sleep(delay)
            run.send_signal(number)
            asked = time.monotonic()
            _, said = run.communicate(timeout=60)
        kills.append((number.name, delay, run.returncode))
        if number == signal.SIGKILL:
            assert run.returncode == -signal.SIGKILL, kills
        else:
            assert run.returncode == 0 and time.monotonic() - asked < 10, (kills, said)
            assert f"stopped by {number.name} after step" in said
    with start(tmp_path / "killed") as run:
        _, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert "Traceback" not in said
    assert final(tmp_path / "killed") == final(tmp_path / "whole"), kills
    assert (tmp_path / "killed" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_before_the_first_step(tmp_path):
    with start(tmp_path) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and "Traceback" not in said, said


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has installed a handler of its own for a signal; Linux tells."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_train_py_stopped_while_it_imports(tmp_path, delay):
    """From the moment it can listen, and JAX is yet to be imported, `train.py` leaves in good order."""
    command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while not listens(run.pid, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        asked = time.monotonic()
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and time.monotonic() - asked < 10, said
    assert "stopped by SIGTERM" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
