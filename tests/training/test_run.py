"""A whole run on the digits, small: what it leaves behind, what evaluation makes of it, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jax.tree import leaves
from small_run import small_config

from mpisjax.analysis.curves import draw_curves
from mpisjax.errors import UserError
from mpisjax.training import evaluation
from mpisjax.training.metrics import DivergenceError, read_rows
from mpisjax.training.run import evaluate_at, restore_best, run, saved_config

pytestmark = pytest.mark.unoptimized


def digits():
    """Two epochs."""
    return small_config({"train.epochs": 2})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    return workdir, run(digits(), workdir, on_end=lambda folder: draw_curves(folder, "digits"))


def test_a_run_leaves_everything_behind(done):
    workdir, result = done
    names = {path.name for path in workdir.iterdir()}
    assert {"checkpoints", "curves.png", "metrics.jsonl", "results.json", "tensorboard", "train.log"} <= names
    assert result.step == 2 * (1257 // 64) and not result.stopped
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "validation", "train", "validation", "test"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    log = (workdir / "train.log").read_text()
    for words in ("digits", "checksum", "by class", "parameters", "devices: ", '"forward.num_steps": 2'):
        assert words in log


def test_evaluation_reproduces_the_test_figures(done):
    workdir, result = done
    config = saved_config(workdir)
    assert config.to_dict() == digits().to_dict()
    parts, state, step = restore_best(workdir, config)
    assert step == result.best_step == result.test["checkpoint_step"]
    score = evaluation.as_json(evaluate_at(config, parts, state, parts.dataset.test, None))
    assert {"checkpoint_step": step, **score} == result.test == json.loads((workdir / "results.json").read_text())
    assert score["num_examples"] == 360 and score["num_steps"] == 2
    assert set(score["residual"]) == {"stream1"} and set(score["firing_rates"]) == {"stream1/layer1"}


@pytest.mark.slow
def test_divergence_is_diagnosed(tmp_path):
    config = digits()
    config.train.learning_rate, config.train.warmup_epochs, config.train.max_skipped = 1e30, 0.0, 3
    with pytest.raises(DivergenceError) as told:
        run(config, tmp_path)
    for words in (
        "3 steps in a row",
        "learning rate 9.",
        "spectral radius of the Jacobian",
        "jacobian_penalty",
    ):
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("train.epochs", 0, "train.epochs"),
        ("train.batch_size", 5000, "5000"),
        ("model.fusion_layer", 9, "model.fusion_layer"),
        ("model.num_streams", 0, "model.num_streams"),
        ("neuron.threshold", 0.0, "threshold"),
        ("neuron.leak", 1.5, "leak"),
        ("data.name", "nonsense", "data.name"),
        ("data.num_validation", 99999, "data.num_validation"),
        ("forward.num_steps", 0, "num_steps"),
    ],
)
def test_settings_that_cannot_be_leave_nothing_behind(tmp_path, setting, value, words):
    config = digits()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(UserError) as told:
        run(config, tmp_path / "run")
    assert words in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_home_is_expanded_wherever_a_run_is_named(done, monkeypatch):
    from mpisjax.training.init_from import started_from
    from mpisjax.training.run import assemble
    from mpisjax.training.state import evaluated_variables

    workdir, _ = done
    monkeypatch.setenv("HOME", str(workdir.parent))
    config = saved_config("~/digits")
    parts = assemble(config)
    _, best, step = restore_best("~/digits", config)
    started = started_from("~/digits", parts.state)
    expected = evaluated_variables(best)["params"]
    found = [np.array_equal(a, b) for a, b in zip(leaves(started.params), leaves(expected), strict=True)]
    assert step and all(found)
