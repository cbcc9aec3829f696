"""Two processes and one run: one dies, one is asked to stop, one is started wrongly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, processes

sys.path.insert(0, str(Path(__file__).parent))
from test_devices import difference, environment, finish, free_port, start

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--config.model.stem=(4,)",
    "--config.model.layers=(4,)",
    "--config.model.num_streams=1",
    "--config.model.stride_layer=0",
    "--config.model.fusion_layer=1",
    "--config.forward.num_steps=2",
    "--config.train.warmup_epochs=0.5",
    "--config.train.checkpoint_every=5",
)
HEARTBEAT = 8


class Pair:
    """Two processes of `train.py`, two devices each, and what they say."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.workdir, self.logs = folder / "run", [folder / f"log{number}" for number in (0, 1)]
        shared = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        port = free_port()
        self.processes = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, ROOT / "train.py", "--workdir", self.workdir, *SMALL]
            command += [f"--config.train.epochs={epochs}", f"--heartbeat_seconds={HEARTBEAT}"]
            command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env={**environment(2), **shared})
                )

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 240
        while not list(self.workdir.glob("checkpoints/step_*[0-9]")):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_dies_and_the_same_command_goes_on(tmp_path, victim):
    pair = Pair(tmp_path, epochs=60)
    pair.wait_for_checkpoint()
    pair.processes[victim].send_signal(signal.SIGKILL)
    # The other ends by the error of a collective, or else when no more heartbeats come.
    codes = pair.wait(3 * HEARTBEAT + 30)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    told = pair.logs[1 - victim].read_text()
    assert "another process of this run has ended" in told or "another task died" in told
    if victim == 0:  # going on is the same for both
        return
    again = Pair(tmp_path, epochs=60)
    time.sleep(1)
    assert again.processes[0].poll() is None, again.said()
    deadline = time.monotonic() + 240
    while "images/s" not in again.logs[0].read_text():  # steps are being taken
        assert time.monotonic() < deadline and again.processes[0].poll() is None, again.said()
        time.sleep(0.1)
    assert "going on from the checkpoint of step" in again.logs[0].read_text()
    # And a signal to either one stops both, after the same step, in good order.
    again.processes[1].send_signal(signal.SIGTERM)
    assert again.wait(60) == [0, 0], again.said()


@pytest.mark.slow
def test_a_run_of_two_processes_ends_and_measures_once(tmp_path):
    pair = Pair(tmp_path, epochs=2)
    assert pair.wait(300) == [0, 0], pair.said()
    rows = [json.loads(line) for line in (pair.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "validation", "train", "validation", "test"]
    assert rows[-1]["num_examples"] == 360
    assert len(list((pair.workdir / "tensorboard").iterdir())) == 1
    assert "epoch 1, step" in pair.logs[0].read_text() and "epoch 1, step" not in pair.logs[1].read_text()


@pytest.mark.slow
def test_layers_shared_by_two_devices_change_nothing(tmp_path):
    cases = ("--case", "float32", "--case", "float64")
    finish(
        start(tmp_path / "one", 1, *cases),
        start(tmp_path / "shared", 4, *cases, "--model_parallel", 2, "--save", tmp_path / "saved"),
    )
    for case, tolerance in (("float32", 1e-5), ("float64", 1e-10)):
        assert difference(tmp_path / "one" / f"{case}.npz", tmp_path / "shared" / f"{case}.npz") < tolerance
    assert checkpoints.newest(tmp_path / "saved").step == 10  # whose arrays were gathered from the devices


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("10.0.0.2:8476", 2, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("10.0.0.2", 2, 0), "HOST:PORT"),
        (("10.0.0.2:8476", 2, 2), "--process_id is 2"),
        (("10.0.0.2:8476", 0, 0), "--num_processes 0"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, words):
    with pytest.raises(UserError, match=words):
        processes.initialize(*arguments)


def test_alone_nothing_changes():
    processes.initialize()
    processes.initialize("127.0.0.1:1", 1, 0)
    assert processes.count() == 1 and processes.is_primary()
    assert processes.run_on_primary(lambda: {1, 2}) == {1, 2}  # not by way of JSON
    processes.assert_equal_across_processes("anything", "value")


def test_no_slice_is_looked_for_without_tpu(monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    assert not processes.on_cloud_tpu()
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not processes.on_cloud_tpu()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert processes.on_cloud_tpu()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert not processes.on_cloud_tpu()
