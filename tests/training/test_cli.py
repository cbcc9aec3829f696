"""The command line: what it accepts, and one sentence for everything else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisjax import cli
from mpisjax.errors import UserError

SCRIPT = Path(__file__).with_name("tiny.py")
ROOT = SCRIPT.parents[2]


def config() -> ml_collections.ConfigDict:
    base = tiny.get_config()
    base.data.augment = ml_collections.ConfigDict({"flip": True, "shift": 2})
    base.forward = ml_collections.ConfigDict({"tol": ml_collections.config_dict.placeholder(float)})
    return base


def parse(*arguments: str) -> ml_collections.ConfigDict:
    sorted_ = cli.sort_arguments(arguments)
    assert sorted_.config_file is None and not sorted_.others
    return cli.apply_overrides(config(), sorted_.overrides)


def test_overrides_in_every_form():
    result = parse(
        "--config.train.epochs=3", "-config.train.batch_size", "8", "--config.name=a=b", "--noconfig.data.augment.flip",
        "--config.data.augment.shift", "-1", "--config.data.shape=(3, 4)", "--config.train.learning_rate=1",
        "--config.forward.tol=1e-3",
    )  # fmt: skip
    assert (result.train.epochs, result.train.batch_size, result.name) == (3, 8, "a=b")
    assert result.data.augment.flip is False and result.data.augment.shift == -1
    assert result.data.shape == (3, 4) and result.forward.tol == 1e-3
    assert isinstance(result.train.learning_rate, float)
    assert parse("--config.data.augment.flip=false").data.augment.flip is False
    assert parse("--config.data.augment.flip").data.augment.flip is True
    assert parse("--config.train.epochs=3", "--config.train.epochs=4").train.epochs == 4


def test_sorting():
    arguments = [
        "--workdir",
        "w",
        "--config",
        "a.py:small",
        "--config.x=1",
        "--verbosity=1",
        "extra",
        "--configure",
    ]
    found = cli.sort_arguments(arguments)
    assert found.config_file == "a.py:small"
    assert found.overrides == ["--config.x=1"]
    assert found.others == ["--workdir", "w", "--verbosity=1", "extra", "--configure"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.train.epoch=3"], "no setting config.train.epoch; did you mean config.train.epochs?"),
        (["--config.zzzzzz=3"], "there is no setting config.zzzzzz; see"),
        (["--config.train.epochs.x=3"], "there is no setting config.train.epochs.x"),
        (["--config.=3"], "there is no setting config."),
        (["--config.train..epochs=3"], "there is no setting config.train..epochs"),
        (["--config.train.epochs=three"], "--config.train.epochs=three: invalid literal for int"),
        (["--config.train.epochs=3.5"], "--config.train.epochs=3.5"),
        (["--config.train.epochs="], "--config.train.epochs="),
        (["--config.train.epochs"], "Missing value for flag --config.train.epochs"),
        (["--config.data.augment.flip=maybe"], "--config.data.augment.flip=maybe"),
        (["--config.train=3"], "config.train"),
        (["--config.data.shape=(1,"], "--config.data.shape=(1,"),
        (["--noconfig.train.epochs"], "noconfig.train.epochs"),
        (["--config"], "--config needs a file"),
        (["--noconfig"], "--config needs a file"),
        (["--config", "--workdir=x"], "--config needs a file"),
        (["--config=a.py", "--config=b.py"], "--config is given more than once (a.py, b.py)"),
    ],
)
def test_mistakes(arguments, sentence):
    with pytest.raises(UserError) as told:
        parse(*arguments)
    assert sentence in str(told.value)


KEYS = st.sampled_from(
    ["train.epochs", "train.learning_rate", "name", "data.shape", "data.augment.flip", "train", "data"]
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(KEYS | st.text(max_size=12), st.sampled_from(["", "="]), st.text(max_size=12)), max_size=3
    )
)
def test_any_override_is_taken_or_told(items):
    arguments = [f"--config.{key}{sign}{value}" for key, sign, value in items]
    try:
        result = cli.apply_overrides(config(), cli.sort_arguments(arguments).overrides)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(result, ml_collections.ConfigDict)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_arguments_are_sorted_or_told(arguments):
    try:
        found = cli.sort_arguments(arguments)
    except UserError:
        return
    assert all(item in arguments for item in found.others)


FILES = {
    "def get_config(:\n  pass": "fails with SyntaxError",
    "import ml_collections\n\nx = 1 / 0": "line 3 of",
    "x = 1": "fails with AttributeError",
    "def get_config():\n  return {'a': 1}": "gives no ConfigDict",
    "def get_config():\n  return None": "gives no ConfigDict",
    "def get_config():\n\n  return nonsense": "line 3 of",
    "\0": "fails with",
}


@pytest.mark.parametrize("text", FILES)
def test_a_config_file_that_fails(tmp_path, text):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        cli.load_config(str(path))
    assert FILES[text] in str(told.value) and "bad.py" in str(told.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_config_file_is_taken_or_told(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "any.py"
    path.write_text(text, errors="replace")
    with pytest.raises(UserError):
        cli.load_config(str(path))


def test_missing_config_files(tmp_path):
    for name in ("absent.py", str(tmp_path), "", "nul\0"):
        with pytest.raises(UserError, match="there is no config file"):
            cli.load_config(name)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not a Python file"):
        cli.load_config(str(tmp_path / "notes.txt"))


def test_a_variant_reaches_get_config(tmp_path):
    path = tmp_path / "v.py"
    path.write_text(
        "import ml_collections\ndef get_config(v=None):\n  return ml_collections.ConfigDict({'v': v or ''})"
    )
    assert cli.load_config(f"{path}:small").v == "small"
    assert cli.load_config(str(path)).v == ""


def test_versions_of_jax(log):
    with pytest.raises(UserError, match=r"JAX 0.9.2 is too old; mpisjax needs 0.10 or newer"):
        cli.check_jax("0.9.2")
    cli.check_jax("0.10.2")
    cli.check_jax("0.12.0.dev1")
    assert not log.text
    cli.check_jax("0.13.0")
    cli.check_jax("1.0")
    assert log.text.count("is newer than what mpisjax was tested with") == 2


def test_the_machines_errors_are_explained():
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
    assert "/tmp/x (No space left on device)" in cli.explain(full)
    assert "JAX_PLATFORMS" in cli.explain(RuntimeError("Unable to initialize backend 'cuda': ..."))
    assert "batch_size" in cli.explain(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."))
    assert cli.explain(UserError("a\n b")) == "a b"
    for error in (ValueError("x"), RuntimeError("x"), OSError(errno.EBADF, "x"), KeyError("x")):
        assert cli.explain(error) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.train.epochz=3"], "error: there is no setting config.train.epochz; did you mean"),
        (["--workdri=x"], "error: Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["--workdir={file}"], "is a file or lies below one"),
    ],
)
def test_a_program_says_one_sentence_and_exits_with_1(tmp_path, arguments, sentence):
    (tmp_path / "file").touch()
    given = [item.format(file=tmp_path / "file") for item in arguments]
    command = [sys.executable, SCRIPT, f"--workdir={tmp_path / 'run'}", *given]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert run.returncode == 1
    assert sentence in run.stderr and run.stderr.count("\n") == 1
    assert not run.stdout and not (tmp_path / "run").exists()
