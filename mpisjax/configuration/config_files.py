"""Config files and their overrides: `--config NAME[:VARIANT]`, `--config FILE[:VARIANT]` and `--config.train.epochs=3`.

A config file is Python with a function `get_config()`. An override changes one of its settings; ml_collections parses
its value. Importing this module imports no JAX.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from mpisjax.errors import UserError
from mpisjax.paths import expand

_ARGUMENT = re.compile(r"--?(?P<no>no)?config(?:\.(?P<key>[^=]*))?(?:=(?P<value>.*))?", re.DOTALL)
_FLAG = re.compile(r"--?[A-Za-z]")
# What each type of a setting takes, as a message says it.
_WANTED = {
    bool: "true or false",
    int: "a whole number, such as 3",
    float: "a number, such as 0.1",
    tuple: "numbers in brackets, such as (16,32)",
}


class Arguments(NamedTuple):
    """A command line, sorted.

    Attributes:
        config_file: What `--config` names, None without it.
        overrides: `--config.key=value` (and `--config.key`, `--noconfig.key` of booleans), in order.
        others: The program's own arguments.
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
        # A value may stand apart: `--config FILE`, `--config.key VALUE`. It may be negative, and is not the next flag.
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


def packaged_configs() -> dict[str, Path]:
    """The config files that come with the package, by name: in a wheel inside it, in a clone beside it."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package / "configs")
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def load_config(name: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Runs `get_config` of a config file: `NAME` of one that comes with the package, `FILE`, or either with `:VARIANT`.

    Raises:
        UserError: The file is missing, fails, or gives no config.
    """
    path, _, variant = expand(name).partition(":")
    known = packaged_configs()
    path = str(known.get(path, path))
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path!r}; give a Python file, or one of {', '.join(known)}")
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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"line {lines[-1]} of {path!r}" if lines else f"config file {path!r}"
        raise UserError(f"{where} fails with {type(error).__name__}: {one_line(error)}; mend it") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config() of {path!r} gives no ConfigDict; start from mpisjax.configuration.base()")
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
        setting = _find(config, match["key"])
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", item])
            values(["", item])
            config = values["config"].value
        except Exception as error:  # the parsers raise errors of many types for a mistyped value
            raise UserError(_mistake(match, setting)) from error
    return config.lock()


def changed_by(
    variant: str, config: ml_collections.ConfigDict, name: str | os.PathLike[str]
) -> ml_collections.ConfigDict:
    """A copy of a config, with what a variant of its file changes. The command line's values hold for all the rest.

    Args:
        variant: The variant's name.
        config: The config, overrides applied.
        name: What `load_config` made it from.

    Raises:
        UserError: There is no such variant.
    """
    file = expand(name).partition(":")[0]
    plain, changed = load_config(file), load_config(f"{file}:{variant}")
    config = config.copy_and_resolve_references()
    for key in _keys(changed):
        if (value := _find(changed, key)) != _find(plain, key):
            config.update_from_flattened_dict({key: value})
    return config


def _mistake(match: re.Match[str], setting: Any) -> str:
    key = f"config.{match['key']}"
    if isinstance(setting, ml_collections.ConfigDict):
        return f"{key} is a group of settings; give one of them, such as --{key}.{next(iter(setting), 'KEY')}"
    wanted = _WANTED.get(type(setting), "another value")
    if match["no"]:
        return f"--no{key} is for settings that are true or false; give --{key}=VALUE: {wanted}"
    if match["value"] is None:
        return f"--{key} has no value; give {wanted}"
    return f"{key} is {match['value']!r}; give {wanted}"


def _find(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a setting by its dotted key."""
    here: Any = config
    for part in key.split("."):
        if not isinstance(here, ml_collections.ConfigDict) or part not in here:
            near = difflib.get_close_matches(key, _keys(config), n=1, cutoff=0.5)
            hint = f"; did you mean config.{near[0]}?" if near else "; --help lists all settings"
            raise UserError(f"there is no setting config.{key}{hint}")
        here = here[part]
    return here


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        value = config[name]
        nested = isinstance(value, ml_collections.ConfigDict)
        keys += _keys(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def one_line(error: BaseException) -> str:
    """An error's text in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
