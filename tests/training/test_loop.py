"""The loop: exact resume, one look at the test split, validation's choice, and what it says when things go wrong."""

from __future__ import annotations

import json
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, packing, saving
from mpisjax.storage.preemption import Stopper
from mpisjax.storage.saving import CheckpointWriter
from mpisjax.training import loop
from mpisjax.training.metrics import TIMING, DivergenceError, read_rows
from mpisjax.training.step_runner import Work


class StopAt(tiny.Feed):
    """Asks for a stop while a given step is being fetched, as a signal would."""

    def __init__(self, step: int, stopper: Stopper) -> None:
        super().__init__()
        self.at, self.stopper = step, stopper

    def batch(self, step: int):
        if step == self.at:
            self.stopper.request("SIGTERM")
        return super().batch(step)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(packing.without_keys(tree)[1])]


def rows_of(workdir: Path) -> list[dict]:
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its result, the steps it asked for, and its rows."""
    workdir = tmp_path_factory.mktemp("whole")
    feed = tiny.Feed()
    result = tiny.fit(workdir, feed=feed)
    return result, feed.asked, rows_of(workdir)


def test_runs_to_the_end(whole, tmp_path):
    result, asked, rows = whole
    assert result.step == 24 and not result.stopped
    assert asked == list(range(24))
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 6, 10, 12, 16, 18, 22, 24]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [6, 12, 18, 24]
    assert [row["kind"] for row in rows].count("test") == 1
    assert result.test["accuracy"] > 0.8


# Around a log line (4), an epoch's end (6), a periodic checkpoint (10), in the first and the last step.
@pytest.mark.parametrize("stops", [[0], [3], [4], [5], [6], [9, 10], [11, 12, 13], [23], list(range(0, 24, 2))])
def test_resume_is_exact(whole, tmp_path, stops):
    result, asked, rows = whole
    config = tiny.get_config()
    config.train.checkpoint_every = 5  # it leaves the trajectory as it is
    fetched = []
    for stop in stops:
        stopper = Stopper()
        feed = StopAt(stop, stopper)
        part = tiny.fit(tmp_path, config, feed=feed, stopper=stopper)
        assert part.stopped and part.step == stop + 1
        fetched += feed.asked
    feed = tiny.Feed()
    last = tiny.fit(tmp_path, config, feed=feed)
    assert fetched + feed.asked == asked
    assert bits(last.state) == bits(result.state)
    assert (last.best_step, last.best_accuracy, last.test) == (
        result.best_step,
        result.best_accuracy,
        result.test,
    )
    assert rows_of(tmp_path) == rows


class DiesAt(tiny.Feed):
    """The process is gone at a given step, as by SIGKILL."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def batch(self, step: int):
        if step == self.at:
            raise InterruptedError
        return super().batch(step)


@pytest.mark.parametrize("death", [7, 14, 20, 23])
def test_short_epochs_are_saved_now_and_then_and_resume_is_exact(whole, tmp_path, monkeypatch, death):
    """Only the best state so far (in the first epoch and maybe later) and the last are saved within the time."""
    config, saved, save = tiny.get_config(), [], CheckpointWriter.save
    config.train.checkpoint_seconds = 1000.0
    scores = {6: 0.5, 12: 0.4, 18: 0.6, 24: 0.5}
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda *given, best: saved.append(given[1]) or save(*given, best=best)
    )

    def eval_fn(state):
        return tiny.Evaluation(scores[int(state.step)], 1.0, {})

    with pytest.raises(InterruptedError):
        tiny.fit(tmp_path, config, feed=DiesAt(death), eval_fn=eval_fn)
    last = tiny.fit(tmp_path, config, eval_fn=eval_fn)
    assert saved == [6, 18, 24] and last.best_step == 18
    assert bits(last.state) == bits(whole[0].state)
    rows = rows_of(tmp_path)
    assert [r for r in rows if r["kind"] == "train"] == [r for r in whole[2] if r["kind"] == "train"]
    assert [r["accuracy"] for r in rows if r["kind"] == "validation"] == list(scores.values())


def test_the_longer_a_run_has_taken_the_rarer_it_saves(tmp_path, monkeypatch):
    """A first epoch of 600 s, then epochs of 6 s: longer than `checkpoint_seconds`, less than a twentieth of the
    run.
    """
    config, saved, save, now = tiny.get_config(), [], CheckpointWriter.save, [0.0]
    config.train.checkpoint_seconds = 1.0
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda *given, best: saved.append(given[1]) or save(*given, best=best)
    )
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(saving, "time", clock)

    class Slow(tiny.Feed):
        def batch(self, step: int):
            now[0] += 100.0 if step < 6 else 1.0
            return super().batch(step)

    scores = {6: 0.5, 12: 0.4, 18: 0.3, 24: 0.2}
    tiny.fit(tmp_path, config, feed=Slow(), eval_fn=lambda state: tiny.Evaluation(scores[int(state.step)], 1.0, {}))
    assert saved == [6, 24]
    assert [saving.saving_interval(20.0, t) for t in (0, 100, 600, 12_000, 604_800)] == [20, 20, 30, 600, 600]
    assert [saving.saving_interval(least, 1e6) for least in (0.0, 600.0, 3600.0)] == [0.0, 600.0, 3600.0]


def test_a_stop_in_an_evaluation_saves_what_was_not_due(whole, tmp_path):
    config, stopper, calls = tiny.get_config(), Stopper(), []
    config.train.checkpoint_seconds = 1000.0

    def eval_fn(state):
        calls.append(int(state.step))
        if len(calls) == 2:
            stopper.request("SIGTERM")
        return tiny.evaluate(state, 1)

    assert tiny.fit(tmp_path, config, eval_fn=eval_fn, stopper=stopper).step == 12
    assert checkpoints.steps(tmp_path / checkpoints.FOLDER)[-1] == 12
    assert bits(tiny.fit(tmp_path, config).state) == bits(whole[0].state)
    assert rows_of(tmp_path) == whole[2]


@pytest.mark.parametrize("call", [1, 4])
def test_stop_during_validation_loses_and_repeats_nothing(whole, tmp_path, call):
    stopper, calls = Stopper(), []

    def eval_fn(state):
        calls.append(int(state.step))
        if len(calls) == call:
            stopper.request("SIGTERM")
            pytest.fail("a stop during an evaluation takes effect at once")
        return tiny.evaluate(state, 1)

    part = tiny.fit(tmp_path, eval_fn=eval_fn, stopper=stopper)
    assert part.stopped and part.step == 6 * call
    last = tiny.fit(tmp_path)
    assert bits(last.state) == bits(whole[0].state)
    assert rows_of(tmp_path) == whole[2]


def test_stop_during_the_test_split_is_taken_up_again(whole, tmp_path):
    stopper = Stopper()
    part = tiny.fit(tmp_path, test_fn=lambda state: stopper.request("SIGINT"), stopper=stopper)
    assert part.stopped and part.test is None
    assert tiny.fit(tmp_path).test == whole[0].test
    assert rows_of(tmp_path) == whole[2]


def test_test_split_is_measured_once_with_the_best_state(tmp_path):
    accuracies = {6: 0.5, 12: 0.9, 18: 0.9, 24: 0.7}
    losses = {6: 1.0, 12: 0.4, 18: 0.3, 24: 0.1}
    measured = []

    def eval_fn(state):
        step = int(state.step)
        return tiny.Evaluation(accuracies[step], losses[step], {})

    def test_fn(state):
        measured.append(int(state.step))
        return tiny.evaluate(state, 2)

    config = tiny.get_config()
    config.train.keep_checkpoints = 1
    result = tiny.fit(tmp_path, config, eval_fn=eval_fn, test_fn=test_fn)
    assert measured == [18]  # of two equals the one with the lower loss
    assert (result.best_step, result.best_accuracy) == (18, 0.9)
    assert checkpoints.steps(tmp_path / checkpoints.FOLDER) == [18, 24]
    assert json.loads((tmp_path / "results.json").read_text())["checkpoint_step"] == 18
    again = tiny.fit(tmp_path, config, eval_fn=eval_fn, test_fn=test_fn)
    assert measured == [18] and again.test == result.test and again.step == 24


def test_without_validation_the_last_state_is_tested(tmp_path):
    measured = []

    def test_fn(state):
        measured.append(int(state.step))
        return tiny.evaluate(state, 2)

    result = tiny.fit(tmp_path, eval_fn=None, test_fn=test_fn)
    assert measured == [24] and result.best_accuracy is None and result.best_step == 24


def test_skipped_steps_are_told_and_leave_the_means_clean(tmp_path, log):
    tiny.fit(tmp_path, feed=tiny.Feed(poisoned=frozenset({1, 2, 13, 14, 15, 16})))
    first, *rest = [row for row in rows_of(tmp_path) if row["kind"] == "train"]
    assert first["skipped_steps"] == 2 and np.isfinite(first["loss"])
    assert [row["skipped_steps"] for row in rest if row["step"] in (16, 18)] == [3, 1]
    assert "step 2 gave a loss or gradient that is not finite" in log.text
    assert "epoch 3: 4 of 6 steps were not finite" in log.text


def test_an_interval_without_a_finite_step_has_null_means(tmp_path):
    config = tiny.get_config()
    config.train.log_every = 1
    tiny.fit(tmp_path, config, feed=tiny.Feed(poisoned=frozenset({1})))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["loss"] is None and "NaN" not in lines[1]


def test_divergence_stops_with_the_last_good_state(tmp_path):
    feed = tiny.Feed(poisoned=frozenset(range(8, 99)))

    def diagnose(state, step):
        return f"spectral radius 1.3 at step {step}"

    with pytest.raises(
        DivergenceError, match=r"5 steps in a row .*learning rate 0.1, .* 0.25.*; spectral radius 1.3"
    ) as told:
        tiny.fit(tmp_path, feed=feed, diagnose=diagnose)
    assert "config.train.learning_rate" in str(told.value) and str(tmp_path) in str(told.value)
    saved = checkpoints.newest(tmp_path / checkpoints.FOLDER)
    state = checkpoints.restore(saved, tiny.init_state(tiny.get_config()))
    stopper = Stopper()
    good = tiny.fit(tmp_path / "good", feed=StopAt(7, stopper), stopper=stopper)
    assert saved.step == 13
    assert bits(state.params) == bits(good.state.params) and bits(state.opt_state) == bits(good.state.opt_state)


@pytest.mark.parametrize("share, times", [(0.25, 1), (None, 0)])
def test_work_is_told_once_and_only_beside_a_known_peak(tmp_path, log, share, times):
    tiny.fit(tmp_path, meter=lambda means, rate: Work(2.0, share))
    assert log.text.count("2 TFLOP/s in convolutions and matrix products, 25% of the peak") == times
    assert log.text.count("TFLOP/s") == times


def test_unconverged_solver_is_told_once_and_counted_at_the_end(tmp_path, log):
    tiny.fit(tmp_path, train_step=tiny.make_train_step(tiny.get_config(), converged=False))
    assert (
        log.text.count("step 1: the forward solver has not converged for every sample (residual 0.25 in the mean)") == 1
    )
    said = "stopped above its tolerance for some samples in 24 of 24 steps (largest residual 0.25, the mean of a batch)"
    assert log.text.count(said) == 1
    assert log.text.count("forward solver") == 2


def test_another_config_is_refused_with_the_keys(tmp_path):
    tiny.fit(tmp_path)
    config = tiny.get_config()
    config.train.learning_rate, config.train.epochs, config.train.log_every = 0.2, 9, 1
    with pytest.raises(UserError) as told:
        tiny.fit(tmp_path, config)
    assert "train.epochs (4 there, 9 here), train.learning_rate (0.1 there, 0.2 here); use" in str(told.value)
    assert "log_every" not in str(told.value)


def test_other_data_are_refused(tmp_path):
    tiny.fit(tmp_path)
    with pytest.raises(UserError, match=r"other data \(checksum 000000000000, now 111111111111\)"):
        tiny.fit(tmp_path, data_checksum="1" * 64)


def test_a_state_that_does_not_count_steps_is_found_out(tmp_path):
    step = tiny.make_train_step(tiny.get_config())

    def stuck(state, batch):
        new, metrics = step(state, batch)
        return new._replace(step=state.step), metrics

    with pytest.raises(RuntimeError, match="the state says step 0 after 6 steps"):
        tiny.fit(tmp_path, train_step=stuck)


@pytest.mark.parametrize("harm", ["latest", "best"])
def test_damaged_checkpoint_is_named_and_training_ends_the_same(whole, tmp_path, log, harm):
    stopper = Stopper()
    config = tiny.get_config()
    config.train.keep_checkpoints = 3
    tiny.fit(tmp_path, config, feed=StopAt(13, stopper), stopper=stopper)
    latest = checkpoints.steps(tmp_path / checkpoints.FOLDER)[-1]
    victim = 14 if harm == "latest" else 12
    assert latest == 14
    written = (tmp_path / checkpoints.FOLDER / f"step_{victim:08d}" / "state").rglob("*")
    target = max((path for path in written if path.is_file()), key=lambda path: path.stat().st_size)
    target.write_bytes(target.read_bytes()[:-1])
    last = tiny.fit(tmp_path, config)
    assert (str(target) in log.text) == (harm == "latest")
    assert bits(last.state) == bits(whole[0].state)
    assert rows_of(tmp_path) == whole[2]


def test_on_epoch_sees_every_validation_and_true_ends_the_training(whole, tmp_path):
    seen, ended = [], []

    def on_epoch(state, metrics):
        seen.append((int(state.step), metrics["step"], metrics["epoch"]))
        assert metrics["accuracy"] == tiny.evaluate(state, 1).accuracy
        return metrics["epoch"] == 3

    result = tiny.fit(tmp_path, on_epoch=on_epoch, on_end=ended.append)
    assert seen == [(6, 6, 1), (12, 12, 2), (18, 18, 3)]
    assert result.step == 18 and not result.stopped and result.test is not None
    assert ended == [tmp_path]
    rows = rows_of(tmp_path)
    assert [row for row in rows if row["kind"] != "test"] == [row for row in whole[2] if row["step"] <= 18]
    # The same command trains no further, and measures nothing again.
    feed = tiny.Feed()
    again = tiny.fit(tmp_path, feed=feed, on_epoch=on_epoch, test_fn=lambda state: pytest.fail("measured"))
    assert feed.asked == [] and len(seen) == 3 and again.step == 18 and again.test == result.test
    assert bits(again.state) == bits(result.state)


def test_on_epoch_that_gives_nothing_changes_nothing(whole, tmp_path):
    assert bits(tiny.fit(tmp_path, on_epoch=lambda state, metrics: None).state) == bits(whole[0].state)
    assert rows_of(tmp_path) == whole[2]


def test_the_end_of_a_run_is_told_once_it_is_complete(tmp_path):
    stopper, ended = Stopper(), []
    tiny.fit(tmp_path, feed=StopAt(3, stopper), stopper=stopper, on_end=ended.append)
    assert ended == []
    tiny.fit(tmp_path, on_end=lambda folder: ended.append(json.loads((folder / "results.json").read_text())))
    assert ended[0]["checkpoint_step"] in (6, 12, 18, 24)


def full_disk(folder):
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_at_the_end_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"results cannot be written .*; training itself is complete"):
        tiny.fit(tmp_path, on_end=full_disk)


def scored(scores):
    """An evaluation that gives these accuracies by step."""
    return lambda state: tiny.Evaluation(scores[int(state.step)], 1.0, {})


def test_training_ends_when_patience_does_and_goes_on_with_more(tmp_path, log):
    config, eval_fn = tiny.get_config(), scored({6: 0.5, 12: 0.6, 18: 0.6, 24: 0.5, 30: 0.7, 36: 0.1})
    config.train.epochs, config.train.patience = 6, 2
    first = tiny.fit(tmp_path, config, eval_fn=eval_fn)
    assert (first.step, first.best_step, first.stopped) == (24, 12, False) and first.test is not None
    again = tiny.fit(tmp_path, config, eval_fn=eval_fn, test_fn=lambda state: pytest.fail("measured"))
    assert again.step == 24 and again.test == first.test
    assert "2 epochs brought nothing better: raise train.patience to go on" in log.text
    config.train.patience = 3  # is no part of what a run is made of
    longer = tiny.fit(tmp_path, config, eval_fn=eval_fn)
    assert (longer.step, longer.best_step) == (36, 30)
    with pytest.raises(UserError, match="train.patience is 3, but no examples are held out"):
        tiny.fit(tmp_path / "without", config, eval_fn=None)


@pytest.mark.parametrize("how", ["to its end", "by on_epoch", "killed in the longer run"])
def test_more_epochs_continue_a_complete_run(whole, tmp_path, log, how):
    config, ends = tiny.get_config(), how == "by on_epoch"
    config.train.epochs = 2
    first = tiny.fit(tmp_path, config, on_epoch=lambda state, m: ends and m["epoch"] == 1)
    assert first.step == (6 if ends else 12) and first.test is not None
    config.train.epochs = 4
    if how == "killed in the longer run":
        with pytest.raises(InterruptedError):
            tiny.fit(tmp_path, config, feed=DiesAt(20))
    last = tiny.fit(tmp_path, config)
    assert bits(last.state) == bits(whole[0].state)  # the tiny task has one learning rate
    assert last.test == whole[0].test and "goes on to 4: from here on the learning rate" in log.text
    tests = [row["step"] for row in rows_of(tmp_path) if row["kind"] == "test"]
    assert tests == [first.step, 24]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 3}, "the learning rate would follow another curve"),
        ({"epochs": 5}, "the learning rate would follow another curve"),
        ({"learning_rate": 0.2}, "trained in another way than its beginning"),
    ],
)
def test_what_another_setting_would_mean_is_told(tmp_path, change, words):
    stopper = Stopper()
    tiny.fit(tmp_path, feed=StopAt(13, stopper), stopper=stopper)  # not complete
    config = tiny.get_config()
    config.train.update(change)
    with pytest.raises(UserError) as told:
        tiny.fit(tmp_path, config)
    assert words in str(told.value) and f"train.init_from={tmp_path}" in str(told.value)
