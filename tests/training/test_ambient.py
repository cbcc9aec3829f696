"""JAX's settings of the moment leave no trace in a run's files: the random generator and x64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mpisjax.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--config.model.stem=(4,)",
    "--config.model.layers=(4,)",
    "--config.model.num_streams=1",
    "--config.model.stride_layer=0",
    "--config.model.fusion_layer=1",
    "--config.model.dropout=0.1",
    "--config.forward.num_steps=2",
    "--config.train.epochs=1",
    "--config.train.warmup_epochs=0.5",
    "--config.train.checkpoint_every=10",
    "--config.train.keep_checkpoints=9",
]


def program(name: str, *arguments: object, **settings: str) -> str:
    """Runs a program of the repository; gives what it says."""
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_ENABLE_X64",)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **settings}
    command = [sys.executable, ROOT / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def last(workdir: Path) -> tuple[checkpoints.Checkpoint, dict[str, bytes]]:
    """The newest checkpoint, and its bits by dtype."""
    import orbax.checkpoint as ocp

    found = checkpoints.newest(workdir / checkpoints.FOLDER)
    assert found is not None and found.one_piece
    arrays = ocp.PyTreeCheckpointer().restore(found.path / checkpoints.STATE_NAME)
    return found, {dtype: array.tobytes() for dtype, array in arrays.items()}


@pytest.mark.parametrize(
    ("name", "value", "impl"),
    [
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", "rbg"),
        pytest.param("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg", "unsafe_rbg", marks=pytest.mark.slow),
        pytest.param("JAX_ENABLE_X64", "1", "threefry2x32", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_evaluated_and_goes_on_where_the_setting_is_another(tmp_path, name, value, impl):
    train = ("train.py", f"--workdir={tmp_path / 'run'}", *SMALL)
    program(*train, **{name: value})
    found, whole = last(tmp_path / "run")
    assert list(found.key_impls.values()) == [impl]
    assert {text.partition("[")[0] for text in found.layout.values()} == {"float32", "int32", "uint32"}
    # Evaluation.
    results = tmp_path / "results.json"
    program("evaluate.py", f"--workdir={tmp_path / 'run'}", f"--json={results}")
    measured = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(results.read_text())["accuracy"] == pytest.approx(measured["accuracy"], abs=0.01)
    # Going on from the middle of the run.
    for step in checkpoints.steps(tmp_path / "run" / checkpoints.FOLDER)[1:]:
        path = tmp_path / "run" / checkpoints.FOLDER / f"step_{step:08d}"
        path.rename(tmp_path / path.name)
    assert "going on from the checkpoint of step 10 of 19" in program(*train)
    again, bits = last(tmp_path / "run")
    assert again.step == found.step and again.key_impls == found.key_impls and again.layout == found.layout
    if name == "JAX_DEFAULT_PRNG_IMPL":  # x64 itself draws other numbers
        assert bits == whole
    else:  # and the other way round
        program("evaluate.py", f"--workdir={tmp_path / 'run'}", f"--json={results}", **{name: value})


SWITCHES = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_CHECK_TRACER_LEAKS": "1",
    "JAX_DEBUG_NANS": "1",
}
EVERYTHING = [
    "--config.train.ema=0.9",
    "--config.train.jacobian_penalty=0.1",
    "--config.train.gradient_clip=1",
    "--config.train.accumulate=2",
    "--config.train.label_smoothing=0.1",
    "--config.data.augment.mixup=0.2",
    "--config.data.augment.flip=True",
    "--config.data.augment.cutout=2",
    "--config.model.learn_threshold=True",
]


@pytest.mark.parametrize(
    ("mode", "more", "switches"),
    [
        ("rates", EVERYTHING, SWITCHES),
        ("spikes", ["--config.adjoint.solver=anderson"], SWITCHES),
        pytest.param("spikes", ["--config.train.method=bptt"], SWITCHES, marks=pytest.mark.slow),
        pytest.param("rates", [], {"JAX_DISABLE_JIT": "1"}, marks=pytest.mark.slow),
    ],
)
def test_jaxs_debugging_switches_find_nothing_in_a_run(tmp_path, mode, more, switches):
    """Training steps, validation, the test split, checkpoints."""
    quick = ["--config.train.batch_size=600", f"--config.forward.mode={mode}", "--config.forward.max_steps=3"]
    assert "test accuracy" in program("train.py", f"--workdir={tmp_path}", *SMALL, *quick, *more, **switches)


def test_a_key_of_an_earlier_version_is_read_by_its_length():
    key = jax.random.key(3, impl="rbg")
    impls, arrays = checkpoints.without_keys({"rng": key})
    assert impls == {"['rng']": "rbg"}
    back = checkpoints.with_keys(arrays, {"rng": jax.random.key(0, impl="threefry2x32")}, {})
    assert back["rng"].dtype == key.dtype
