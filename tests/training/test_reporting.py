"""Rows on disk, TensorBoard, progress on a terminal and elsewhere, the curves, and the record of a config."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import textwrap
from pathlib import Path

import ml_collections
import pytest
import tiny
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto import event_pb2

from mpisjax import cli, configuration
from mpisjax.analysis.curves import draw_curves
from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, record
from mpisjax.training import console
from mpisjax.training.console import describe, display, duration, solves
from mpisjax.training.metrics import DivergenceMonitor, MetricsLog, average, read_rows
from mpisjax.training.run import FILE_ONLY
from mpisjax.training.step_runner import StepRunner


def test_average_leaves_out_what_was_skipped():
    rows = [
        {"loss": 1.0, "finite": 1.0, "skipped": 0.0},
        {"loss": math.nan, "finite": 0.0, "skipped": 1.0},
        {"loss": 2.0, "finite": 1.0, "skipped": 0.0},
    ]
    assert average(rows) == {"loss": 1.5, "skipped_steps": 1.0}
    assert average(rows[1:2]) == {"loss": None, "skipped_steps": 1.0}


def test_rows_are_cut_back_to_a_length(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": 0.1 + 0.2})
    length = log.sync()
    log.write("train", 2, {"loss": math.inf, "residual": {"stream1": math.nan, "stream2": 0.5}})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[1]["residual"] == {"stream1": None, "stream2": 0.5}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"torn": ')
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    log = MetricsLog(tmp_path, length=length, step=1)
    log.write("train", 2, {"loss": 1.0})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 1, "loss": 0.1 + 0.2},
        {"kind": "train", "step": 2, "loss": 1.0},
    ]


def test_a_lost_metrics_file_is_told(tmp_path, log):
    MetricsLog(tmp_path, length=500, step=7).close()
    assert "rows before step 7 are missing" in log.text


def test_tensorboard_events(tmp_path):
    log = MetricsLog(tmp_path, step=4)
    log.write("validation", 6, {"accuracy": 0.5, "loss": None, "residual": {"stream1": 0.25}})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, restart, row = EventFileLoader(str(path)).Load()  # checks each record's two sums
    assert version.file_version == "brain.Event:2"
    assert restart.step == 5 and restart.session_log.status == event_pb2.SessionLog.START
    assert row.step == 6
    tensors = {value.tag: value.tensor.float_val[0] for value in row.summary.value}
    assert tensors == {"validation/accuracy": 0.5, "validation/residual/stream1": 0.25}


def test_other_frameworks_are_left_alone(tmp_path, python):
    for name in ("torch", "tensorflow"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')\n")
    (tmp_path / "run").mkdir()
    program = """
        import pathlib
        from mpisjax.training.metrics import MetricsLog
        log = MetricsLog(pathlib.Path("run"))
        log.write("train", 1, {"loss": 1.0})
        log.close()
    """
    path = os.pathsep.join((str(Path(__file__).parents[2]), str(tmp_path)))
    ended = python("-c", textwrap.dedent(program), cwd=tmp_path, PYTHONPATH=path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics cannot be written to .*; free some space"):
        MetricsLog(tmp_path).write("train", 1, {"loss": 1.0})


MEANS = {
    "loss": 0.12345, "accuracy": 0.9876, "forward_steps": 6.0, "forward_residual": 0.0123,
    "adjoint_steps": 4.0, "adjoint_residual": 0.5, "skipped_steps": 0.0,
}  # fmt: skip


def test_description():
    assert describe(MEANS, 12345.6) == "loss 0.1235, accuracy 98.76%, 12,346 images/s"
    assert describe({"loss": None, "accuracy": None, "skipped_steps": 4.0}, None, "validation 90.00%") == (
        "loss not finite, accuracy not finite, validation 90.00%, 4 skipped"
    )
    assert solves(MEANS) == "forward 6 steps, residual 0.012; adjoint 4 steps, residual 0.5"
    assert solves({"loss": 1.0}) == ""
    assert [duration(3725.4), duration(None)] == ["1:02:05", "-:--:--"]


def lines_of(start: int = 0) -> list[str]:
    """What is printed of two epochs of ten steps, an interval of four, four and two in each."""
    stream = io.StringIO()
    with display(20, 10, start, stream) as screen:
        for step in range(start + 1, 21):
            means = {**MEANS, "loss": float(step), "skipped_steps": float(step == 8)}
            screen.step(step, means, 100.0 if step < 20 else 50.0, due=step % 10 in (4, 8, 0))
            if step % 10 == 0:
                screen.epoch("validation 90.00%")
    return stream.getvalue().splitlines()


def test_without_a_terminal_an_epoch_is_a_line():
    first, *epochs = lines_of()
    assert first == "epoch 1, step 1/20: loss 1.0000, accuracy 98.76%, 100 images/s"
    assert [line.rpartition(", ")[0] for line in epochs] == [  # means over steps, and images over seconds
        "epoch 1/2: loss 6.8000, accuracy 98.76%, validation 90.00%, 100 images/s, 1 skipped",
        "epoch 2/2: loss 16.8000, accuracy 98.76%, validation 90.00%, 83 images/s",
    ]
    assert epochs[-1].endswith(", 0:00:00 left")


def test_a_run_that_goes_on_in_an_epoch_describes_its_own_steps():
    assert [line.partition(", accuracy")[0] for line in lines_of(18)] == [
        "epoch 2, step 19/20: loss 19.0000",
        "epoch 2/2: loss 20.0000",
    ]
    assert lines_of(20) == []


def test_a_long_epoch_has_a_line_a_minute(monkeypatch):
    now = iter(range(0, 10_000, 25))  # each look at the clock is 25 seconds after the one before
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    shown = [line.partition(":")[0] for line in lines_of()]
    assert shown[0] == "epoch 1, step 1/20" and shown[-1] == "epoch 2/2" and shown.count("epoch 1/2") == 1
    assert 5 < len(shown) < 20, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch, log):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with display(20, 10, 4, stream) as screen:
        for step in range(5, 21):
            screen.step(step, MEANS, 100.0, due=step == 10)
            if step == 10:
                screen.epoch("validated [bold]")
        logging.getLogger("mpisjax.training").warning("seen above the bar")
    text = stream.getvalue()
    assert "epoch 2/2" in text and "20/20" in text and "residual 0.012; adjoint 4 steps" in text
    assert (
        "epoch 1/2: loss 0.1235, accuracy 98.76%, validated [bold], 100 images/s" in text
        and "seen above the bar" in text
    )


def test_health_counts_skips_across_reads():
    monitor = DivergenceMonitor(max_skipped=3)
    good = {"finite": 1.0, "skipped": 0.0, "learning_rate": 0.1}
    monitor.look([good, {**good, "finite": 0.0, "skipped": 1.0}], 2)
    monitor.look([{**good, "finite": 0.0, "skipped": 2.0}], 3)
    with pytest.raises(UserError, match="training stopped at step 4: 3 steps in a row"):
        monitor.look([{**good, "finite": 0.0, "skipped": 3.0}, good], 5)


def test_pipeline_hands_over_every_step_once():
    config = tiny.get_config()
    state = tiny.init_state(config)
    runner = StepRunner(tiny.make_train_step(config), tiny.Feed(), state)
    assert runner.waits  # on a CPU
    for waits in (True, False):
        runner.waits = waits
        for step in range(9):
            state = runner.run(state, step)
        rows = runner.collect()
        assert len(rows) == 9 and runner.collect() == []
        assert set(rows[0]) == set(tiny.Metrics._fields)
        assert runner.rate(16) > 0 and runner.rate(16) is None


def test_curves_of_a_run_and_of_nothing(tmp_path):
    rows = []
    for step in range(10, 101, 10):
        row = {key: value / step for key, value in MEANS.items()}
        rows.append({"kind": "train", "step": step, **row, "learning_rate": 0.1 / step, "grad_norm": None})
    rows.append({"kind": "validation", "step": 50, "loss": 0.2, "accuracy": 0.5})
    rows.append({"kind": "test", "step": 100, "loss": 0.2, "accuracy": 0.5})
    for name, some in (("some", rows), ("none", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        draw_curves(tmp_path / name, "a run")
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "some/curves.png").stat().st_size > (tmp_path / "none/curves.png").stat().st_size
    assert not list(tmp_path.rglob("*.draft"))


def test_a_config_survives_json():
    config = tiny.get_config()
    config.model = ml_collections.ConfigDict({"stem": (16, (3, 4)), "tol": None, "flag": True})
    back = configuration.from_plain(json.loads(json.dumps(configuration.to_plain(config))))
    assert back.to_dict() == config.to_dict() and back.model.stem == (16, (3, 4))


def test_best_falls_back_to_the_best_that_is_sound(tmp_path, log):
    accuracies = {6: 0.6, 12: 0.9, 18: 0.7, 24: 0.5}
    config = tiny.get_config()
    config.train.keep_checkpoints = 4
    tiny.fit(
        tmp_path,
        config,
        eval_fn=lambda state: tiny.Evaluation(accuracies[int(state.step)], 1.0, {}),
        test_fn=None,
    )
    assert record.best(tmp_path).step == 12
    target = tmp_path / checkpoints.FOLDER / "step_00000012" / "checkpoint.json"
    target.write_bytes(target.read_bytes()[:-3])
    assert record.best(tmp_path).step == 18
    assert "the best checkpoint, of step 12, is damaged" in log.text and str(target) in log.text
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        record.best(tmp_path / "absent")


def test_settings_go_to_the_log_and_not_to_the_screen(capsys):
    logger = logging.getLogger("mpisjax")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        cli.set_up_log()
        logger.info("seen")
        logger.info("config: {}", extra=FILE_ONLY)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    assert capsys.readouterr().err == "seen\n"
