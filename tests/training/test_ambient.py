"""JAX's settings of the moment leave no trace in a run's files: the random generator and x64."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
from small_run import small_config

from mpisjax.storage import checkpoints
from mpisjax.training.run import evaluate_at, restore_best, run, saved_config

pytestmark = pytest.mark.unoptimized


def config(**settings):
    """Two checkpoints in the only epoch, the first of them after 10 of 19 steps."""
    every = {"model.dropout": 0.1, "train.checkpoint_every": 10, "train.keep_checkpoints": 9}
    return small_config({**every, **settings})


def last(workdir: Path) -> tuple[checkpoints.Checkpoint, dict[str, bytes]]:
    """The newest checkpoint, and its bits by dtype."""
    found = checkpoints.newest(workdir / checkpoints.FOLDER)
    assert found is not None
    arrays = ocp.PyTreeCheckpointer().restore(found.path / checkpoints.STATE_NAME)
    return found, {dtype: array.tobytes() for dtype, array in arrays.items()}


def evaluated(workdir: Path) -> float:
    settings = saved_config(workdir)
    parts, state, _ = restore_best(workdir, settings)
    return evaluate_at(settings, parts, state, parts.dataset.test, None).accuracy


@pytest.mark.parametrize(
    ("setting", "impl"),
    [
        (lambda: jax.default_prng_impl("rbg"), "rbg"),
        pytest.param(lambda: jax.default_prng_impl("unsafe_rbg"), "unsafe_rbg", marks=pytest.mark.slow),
        pytest.param(lambda: jax.enable_x64(True), "threefry2x32", marks=pytest.mark.slow),
    ],
    ids=["rbg", "unsafe_rbg", "x64"],
)
def test_a_run_is_evaluated_and_goes_on_where_the_setting_is_another(tmp_path, log, setting, impl):
    with setting():
        first = run(config(), tmp_path)
    found, whole = last(tmp_path)
    assert list(found.key_impls.values()) == [impl]
    assert {text.partition("[")[0] for text in found.layout.values()} == {"float32", "int32", "uint32"}
    assert evaluated(tmp_path) == pytest.approx(first.test["accuracy"], abs=0.01)
    # Going on from the middle of the run.
    for step in checkpoints.steps(tmp_path / checkpoints.FOLDER)[1:]:
        path = tmp_path / checkpoints.FOLDER / f"step_{step:08d}"
        path.rename(tmp_path / path.name)
    run(config(), tmp_path)
    assert "going on from the checkpoint of step 10 of 19" in log.text
    again, bits = last(tmp_path)
    assert again.step == found.step and again.key_impls == found.key_impls and again.layout == found.layout
    if impl != "threefry2x32":  # x64 itself draws other numbers
        assert bits == whole
    else:  # and the other way round
        with setting():
            evaluated(tmp_path)


def debugging():
    """JAX's debugging switches, all of them."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.checking_leaks())
    stack.enter_context(jax.debug_nans(True))
    return stack


EVERYTHING = {
    "train.ema": 0.9,
    "train.jacobian_penalty": 0.1,
    "train.gradient_clip": 1.0,
    "train.accumulate": 2,
    "train.label_smoothing": 0.1,
    "data.augment.mixup": 0.2,
    "data.augment.flip": True,
    "data.augment.cutout": 2,
    "model.learn_threshold": True,
}


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize(
    ("mode", "more", "switches"),
    [
        ("rates", EVERYTHING, debugging),
        ("spikes", {"adjoint.solver": "anderson"}, debugging),
        pytest.param("spikes", {"train.method": "bptt"}, debugging, marks=pytest.mark.slow),
        pytest.param("rates", {}, jax.disable_jit, marks=pytest.mark.slow),
    ],
)
def test_jaxs_debugging_switches_find_nothing_in_a_run(tmp_path, mode, more, switches):
    """Training steps, validation, the test split, checkpoints."""
    with switches():
        done = run(config(**{"train.batch_size": 600, "forward.mode": mode, "forward.max_steps": 3, **more}), tmp_path)
    assert done.step == 2 and 0 <= done.test["accuracy"] <= 1
