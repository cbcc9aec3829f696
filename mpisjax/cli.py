"""The command line that `train.py` and `evaluate.py` share: config files, overrides, and errors told in one
sentence.

`--config FILE[:VARIANT]` names a Python file with `get_config()`, and `--config.train.epochs=3` overrides one
of its settings, parsed by ml_collections. Whatever is wrong with either is said on standard error, with exit
code 1. This module must stay free of JAX: programs choose their devices between parsing the command line and
importing it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mpisjax.errors import UserError
from mpisjax.training.preemption import SIGNALS, Preempted

_ARGUMENT = re.compile(r"--?(?P<no>no)?config(?:\.(?P<key>[^=]*))?(?:=(?P<value>.*))?", re.DOTALL)
_FLAG = re.compile(r"--?[A-Za-z]")

# The versions of JAX that the tests were run with: from the first, up to but without the second.
JAX_VERSIONS = ("0.10", "0.13")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes (not needed on Cloud TPU)"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes share the run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "with several processes: silence after which one counts as dead", lower_bound=5
)
_log = logging.getLogger(__name__)


class Arguments(NamedTuple):
    """A command line, sorted.

    Attributes:
        config_file: What `--config` names, None without it.
        overrides: `--config.key=value` (and `--config.key`, `--noconfig.key` of booleans), in order.
        others: The rest, for absl.
    """

    config_file: str | None
    overrides: list[str]
    others: list[str]


def sort_arguments(arguments: Sequence[str]) -> Arguments:
    """Parts a command line (without the program's name) into the config file, its overrides and the rest.

    Raises:
        UserError: `--config` has no value or is given twice.
    """
    files: list[str] = []
    overrides: list[str] = []
    others: list[str] = []
    waiting = deque(arguments)
    while waiting:
        argument = waiting.popleft()
        match = _ARGUMENT.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        # A value may stand apart: `--config FILE`, `--config.key VALUE`; it is not the next flag, but may be
        # negative.
        if match["value"] is None and not match["no"] and waiting and not _FLAG.match(waiting[0]):
            argument = f"{argument}={waiting.popleft()}"
        if match["key"] is not None:
            overrides.append(argument)
        elif "=" in argument and not match["no"]:
            files.append(argument.split("=", 1)[1])
        else:
            raise UserError("--config needs a file, such as --config configs/digits.py")
    if len(files) > 1:
        raise UserError(f"--config is given more than once ({', '.join(files)}); give it once")
    return Arguments(files[0] if files else None, overrides, others)


def load_config(name: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of a config file, `FILE` or `FILE:VARIANT`.

    Raises:
        UserError: The file is missing, fails, or gives no config.
    """
    path, _, variant = name.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path!r}; give one of configs/*.py")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path!r} is not a Python file; give one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == spec.origin
        ]
        where = f"line {lines[-1]} of {path!r}" if lines else f"config file {path!r}"
        raise UserError(f"{where} fails with {type(error).__name__}: {_one_line(error)}; mend it") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config() of {path!r} gives no ConfigDict; start from mpisjax.configuration.base()"
        )
    return config


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Applies `--config.key=value` arguments to a config, which is locked and changed in place.

    Raises:
        UserError: An override names no setting, or its value has another type.
    """
    for item in overrides:
        match = _ARGUMENT.fullmatch(item)
        if match is None or match["key"] is None:
            raise UserError(f"cannot read {item!r}; give --config.key=value")
        _check_key(config, match["key"])
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
        return values["config"].value
    except Exception as error:  # whatever a mistyped value makes the parsers raise is the user's to mend
        raise UserError(f"cannot read {' '.join(overrides)!r}: {_one_line(error)}") from error


def run(
    main: Callable[[ml_collections.ConfigDict], int | None],
    make_config: Callable[[Arguments], ml_collections.ConfigDict],
) -> NoReturn:
    """Runs a program to its exit code: 0, or 1 and one sentence on standard error.

    Args:
        main: Takes the config; absl's flags have been parsed. A `UserError` of its own is told in the same
            way.
        make_config: Takes the sorted arguments and gives the config without its overrides.
    """
    config: list[ml_collections.ConfigDict] = []

    def parse(argv: Sequence[str]) -> list[str]:
        with report_user_errors():
            arguments = sort_arguments(argv[1:])
            try:
                rest = flags.FLAGS([argv[0], *arguments.others])[1:]
            except flags.Error as error:
                raise UserError(f"{_one_line(error)}; --help lists the flags") from error
            if rest:
                raise UserError(f"unexpected argument {rest[0]!r}; settings are given as --config.key=value")
            config.append(apply_overrides(make_config(arguments), arguments.overrides))
        return [argv[0]]

    def program(argv: list[str]) -> int | None:
        del argv
        _set_up_log()
        with report_user_errors():
            check_jax(importlib.metadata.version("jax"))
            return main(config[0])

    app.run(program, flags_parser=parse)
    raise AssertionError("app.run returned")


def process_arguments() -> tuple[str | None, int | None, int | None, int]:
    """What the flags say of the processes that share the run, as `mpisjax.training.processes.initialize` takes it."""
    return COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, HEARTBEAT.value


def config_from(default: str | os.PathLike[str]) -> Callable[[Arguments], ml_collections.ConfigDict]:
    """For `run`: the config of the file that `--config` names, or of `default`."""
    return lambda arguments: load_config(
        os.fspath(default) if arguments.config_file is None else arguments.config_file
    )


def check_jax(version: str) -> None:
    """Refuses a JAX older than what mpisjax was tested with, and warns of one that is newer.

    Raises:
        UserError: It is older.
    """
    oldest, beyond = JAX_VERSIONS
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < tuple(map(int, oldest.split("."))):
        raise UserError(
            f"JAX {version} is too old; mpisjax needs {oldest} or newer: pip install -U 'jax>={oldest},<{beyond}'"
        )
    if found >= tuple(map(int, beyond.split("."))):
        _log.warning("JAX %s is newer than what mpisjax was tested with (before %s)", version, beyond)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that is the machine's rather than the program's, None for any other."""
    text = _one_line(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        return f"JAX cannot use the devices asked for ({text}); install their plugin or unset JAX_PLATFORMS"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
        return f"the device has too little memory ({text[:200]}); lower config.train.batch_size or the model's widths"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
        errno.EPERM,
    ):
        return (
            f"cannot write or read {error.filename or 'a file'} ({error.strerror}); mend that and run again"
        )
    return None


def _set_up_log() -> None:
    """Shows the package's log as plain sentences, and of the libraries' (through absl) only warnings."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("mpisjax")
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Tells what a user can mend in one sentence on standard error, and exits with 1."""
    try:
        yield
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Preempted as stop:
        # A second signal must not turn the orderly end into a death.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print(f"stopped by {stop}; run the same command to go on", file=sys.stderr, flush=True)
        sys.exit(0)


def _check_key(config: ml_collections.ConfigDict, key: str) -> None:
    here: Any = config
    for part in key.split("."):
        if not isinstance(here, ml_collections.ConfigDict) or part not in here:
            near = difflib.get_close_matches(key, _keys(config), n=1, cutoff=0.5)
            hint = (
                f"; did you mean config.{near[0]}?"
                if near
                else "; see mpisjax/configuration.py for all of them"
            )
            raise UserError(f"there is no setting config.{key}{hint}")
        here = here[part]


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        value = config[name]
        keys += (
            _keys(value, f"{prefix}{name}.")
            if isinstance(value, ml_collections.ConfigDict)
            else [f"{prefix}{name}"]
        )
    return keys


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
