"""One run on eight devices, on one, and on two processes of two: the same result; and what one saved, the others
restore.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """One host with so many CPU devices, and this checkout to import from."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def start(out: Path, devices: int, *arguments: object) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), "--out", str(out), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


def run_everywhere(folder: Path) -> None:
    """Runs both cases on eight devices, on one, and on two processes of two devices; each leaves a folder."""
    cases, restoring = ("--case", "float32", "--case", "float64"), ("--checkpoint", folder / "saved")
    finish(start(folder / "eight", 8, *cases, "--save", folder / "saved"))
    address = ("--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", 2, "--process_id")
    finish(
        start(folder / "one", 1, *cases, *restoring),
        start(folder / "two_processes", 2, *cases, *restoring, *address, 0),
        start(folder / "two_processes", 2, *cases, *restoring, *address, 1),
    )


def difference(a: Path, b: Path) -> float:
    """The largest of any parameter, statistic or loss."""
    with np.load(a) as mine, np.load(b) as theirs:
        assert set(mine.files) == set(theirs.files) and len(mine.files) > 10
        return max(float(np.abs(mine[name] - theirs[name]).max()) for name in mine.files)


@pytest.mark.slow
def test_the_same_run_everywhere(tmp_path):
    folder = tmp_path
    run_everywhere(folder)
    # The comparison means something only if steps change what is compared.
    with np.load(folder / "one" / "float32.npz") as found:
        assert found["losses"][-5:].mean() < found["losses"][:5].mean() - 0.05
    for others in ("one", "two_processes"):
        assert difference(folder / "eight" / "float32.npz", folder / others / "float32.npz") < 1e-5
        assert difference(folder / "eight" / "float64.npz", folder / others / "float64.npz") < 1e-10
        # What eight devices saved goes on elsewhere.
        with np.load(folder / "eight" / "next_there.npz") as a, np.load(folder / others / "next.npz") as b:
            assert a["losses"][-1] == pytest.approx(b["losses"][-1], abs=1e-5)
            for name in set(a.files) - {"losses"}:
                np.testing.assert_allclose(a[name], b[name], atol=1e-5)
    # Evaluation is exact on 360 examples, which fill no whole number of batches.
    one = json.loads((folder / "one" / "evaluation.json").read_text())
    two = json.loads((folder / "two_processes" / "evaluation.json").read_text())
    assert one["num_examples"] == two["num_examples"] == 360
    assert one["accuracy"] == two["accuracy"] and one["accuracy_spikes"] == two["accuracy_spikes"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    for key in ("residual", "firing_rates"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)
