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
from mpisjax.cli.arguments import Parser, path, whole_number, whole_numbers
from mpisjax.configuration import config_files
from mpisjax.configuration.settings import SETTINGS
from mpisjax.errors import UserError

SCRIPT = Path(__file__).with_name("tiny.py")
ROOT = SCRIPT.parents[2]


def config() -> ml_collections.ConfigDict:
    base = tiny.get_config()
    base.data.augment = ml_collections.ConfigDict({"flip": True, "shift": 2})
    base.forward = ml_collections.ConfigDict({"tol": ml_collections.config_dict.placeholder(float)})
    return base


def parse(*arguments: str) -> ml_collections.ConfigDict:
    sorted_ = config_files.sort_arguments(arguments)
    assert sorted_.config_file is None and not sorted_.others
    return config_files.apply_overrides(config(), sorted_.overrides)


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
    found = config_files.sort_arguments(arguments)
    assert found.config_file == "a.py:small"
    assert found.overrides == ["--config.x=1"]
    assert found.others == ["--workdir", "w", "--verbosity=1", "extra", "--configure"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.train.epoch=3"], "no setting config.train.epoch; did you mean config.train.epochs?"),
        (["--config.zzzzzz=3"], "there is no setting config.zzzzzz; --help lists"),
        (["--config.train.epochs.x=3"], "there is no setting config.train.epochs.x"),
        (["--config.=3"], "there is no setting config."),
        (["--config.train..epochs=3"], "there is no setting config.train..epochs"),
        (["--config.train.epochs=three"], "config.train.epochs is 'three'; give a whole number, such as 3"),
        (["--config.train.epochs=3.5"], "config.train.epochs is '3.5'; give a whole number"),
        (["--config.train.epochs="], "config.train.epochs is ''; give a whole number"),
        (["--config.train.epochs"], "--config.train.epochs has no value; give a whole number"),
        (["--config.data.augment.flip=maybe"], "config.data.augment.flip is 'maybe'; give true or false"),
        (["--config.train=3"], "config.train is a group of settings; give one of them"),
        (
            ["--config.data.shape=(1,"],
            "config.data.shape is '(1,'; give numbers in brackets, such as (16,32)",
        ),
        (["--noconfig.train.epochs"], "--noconfig.train.epochs is for settings that are true or false"),
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
@given(st.lists(st.tuples(KEYS | st.text(max_size=12), st.sampled_from(["", "="]), st.text(max_size=12)), max_size=3))
def test_any_override_is_taken_or_told(items):
    arguments = [f"--config.{key}{sign}{value}" for key, sign, value in items]
    try:
        result = config_files.apply_overrides(config(), config_files.sort_arguments(arguments).overrides)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(result, ml_collections.ConfigDict)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_arguments_are_sorted_or_told(arguments):
    try:
        found = config_files.sort_arguments(arguments)
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
        config_files.load_config(str(path))
    assert FILES[text] in str(told.value) and "bad.py" in str(told.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_config_file_is_taken_or_told(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "any.py"
    path.write_text(text, errors="replace")
    with pytest.raises(UserError):
        config_files.load_config(str(path))


def test_missing_config_files(tmp_path):
    for name in ("absent.py", str(tmp_path), "", "nul\0"):
        with pytest.raises(UserError, match="there is no config file"):
            config_files.load_config(name)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not a Python file"):
        config_files.load_config(str(tmp_path / "notes.txt"))


def test_a_variant_reaches_get_config(tmp_path):
    path = tmp_path / "v.py"
    path.write_text(
        "import ml_collections\ndef get_config(v=None):\n  return ml_collections.ConfigDict({'v': v or ''})"
    )
    assert config_files.load_config(f"{path}:small").v == "small"
    assert config_files.load_config(str(path)).v == ""


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
    ("arguments", "code", "sentence"),
    [
        (["--config.train.epochz=3"], 2, "error: there is no setting config.train.epochz; did you mean"),
        (["--workdir={file}"], 1, "is a file or lies below one"),
    ],
)
def test_a_program_says_one_sentence_and_its_exit_code(tmp_path, arguments, code, sentence):
    (tmp_path / "file").touch()
    given = [item.format(file=tmp_path / "file") for item in arguments]
    command = [sys.executable, SCRIPT, f"--workdir={tmp_path / 'run'}", *given]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert run.returncode == code
    assert sentence in run.stderr and run.stderr.count("\n") == 1
    assert not run.stdout and not (tmp_path / "run").exists()


def tool() -> Parser:
    parser = Parser("tool.py", "A tool.")
    parser.add_argument("--num_steps", type=whole_number(1), default=10, help="time steps")
    parser.add_argument("--seeds", type=whole_numbers(0), help="of the runs")
    parser.add_argument("--scale", choices=("small", "paper"))
    parser.add_argument("--out", type=path, required=True)
    return parser


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num_steps=five"], "--num_steps: 'five' is not a whole number of at least 1"),
        (["--num_steps", "0"], "--num_steps: '0' is not a whole number of at least 1"),
        (["--num-steps=5"], "there is no flag --num-steps; did you mean --num_steps?"),
        (["--num_step=5"], "there is no flag --num_step; did you mean --num_steps?"),
        (["--seeds=0,x"], "--seeds: '0,x' is not whole numbers of at least 0, such as 0,1"),
        (["--scale=huge"], "--scale: invalid choice: 'huge' (choose from "),
        (["--scale"], "--scale: expected one argument"),
        (["extra"], "unexpected argument 'extra'"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_a_tools_mistaken_flag_is_one_sentence_and_2(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        tool().parse_args([*arguments, *(["--out=x"] if arguments else [])])
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert said.err.startswith(f"error: {sentence}") and said.err.count("\n") == 1


def test_a_tools_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = tool().parse_args(["--num_steps", "3", "--seeds=1,0,1", "--out", "~/there"])
    assert (given.num_steps, given.seeds, given.out) == (3, (1, 0), "/home/somebody/there")
    assert tool().parse_args(["--out=gs://bucket/~"]).out == "gs://bucket/~"
    assert "time steps (default: 10)" in tool().format_help()


def test_help_has_every_setting_with_its_default_and_meaning():
    shown = Parser(with_config=True).format_help()
    for name, setting in SETTINGS.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"  --config.{name}="))
        assert str(setting.default).replace(" ", "") in line and setting.meaning.split()[0] in line


def test_a_stop_while_a_class_is_made_is_a_stop(python):
    """In Python 3.11 what is raised there comes out as a RuntimeError."""
    code = """
from mpisjax import cli
from mpisjax.storage.preemption import Preempted

class Stops:
    def __set_name__(self, owner, name):
        raise Preempted("SIGTERM")

with cli.report_user_errors():
    class Made:
        attribute = Stops()
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "stopped by SIGTERM; run the same command to go on\n")
