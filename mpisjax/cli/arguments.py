"""The parser of every program's command line: flags with underscores, and one sentence for each mistake.

A mistyped flag or value is one sentence on standard error and exit code 2. `--help` shows every flag with its default.
Programs with a config are run by `mpisjax.cli.run`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mpisjax.configuration import settings
from mpisjax.paths import expand

_KINDS = {"int": "a whole number", "float": "a number"}
_USAGE = "%(prog)s [flags] [--config NAME|FILE[:VARIANT]] [--config.KEY=VALUE ...]"


class Parser(argparse.ArgumentParser):
    """An `argparse` parser that tells a mistake in one sentence, and whose flags are never abbreviated.

    Args:
        program: What starts the program, such as "python -m mpisjax.export".
        description: The docstring of the program, shown as it is.
        with_config: Whether the program takes `--config` and `--config.KEY=VALUE`; --help then lists the settings.
    """

    def __init__(self, program: str | None = None, description: str | None = None, with_config: bool = False) -> None:
        super().__init__(
            prog=program, description=description, usage=_USAGE if with_config else None, formatter_class=_Help,
            allow_abbrev=False,
        )  # fmt: skip
        self.with_config = with_config

    def format_help(self) -> str:
        """The docstring, the flags, and the settings of a program with a config."""
        text = super().format_help()
        if not self.with_config:
            return text
        return f"{text}\nsettings, with their defaults before a config file changes them:\n{settings.help_text()}\n"

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The flags as a namespace; exits with 2 where a flag or a value is none."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return given

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        message = re.sub(r"invalid (int|float) value: (.*)", lambda m: f"{m[2]} is not {_KINDS[m[1]]}", message)
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}; --help lists the flags\n")

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        flag = argument.split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"there is no flag {flag}" + (f"; did you mean {near[0]}?" if near else "")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and defaults where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, True, "", ()) or action.required:
            return action.help
        return super()._get_help_string(action)


def path(text: str) -> str:
    """The type of a flag that is a path; `~` is the user's home, and a bucket's address stays as it is."""
    return expand(text)


def local_path(text: str) -> Path:
    """The type of a flag that is a path on this machine's disk; `~` is the user's home."""
    return Path(path(text))


def whole_number(least: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not (text.strip().lstrip("-").isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def whole_numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """The type of a flag that is several whole numbers, separated by commas; each counts once."""

    def parse(text: str) -> tuple[int, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdigit() and int(part) >= least for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not whole numbers of at least {least}, such as {least},{least + 1}"
            )
        return tuple(dict.fromkeys(map(int, parts)))

    return parse


def probability(text: str) -> float:
    """The type of a flag that is a probability above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability above 0, at most 1, such as 0.9")
    return value


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """The type of a flag that is several of some names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(part for part in text.split(",") if part)
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose from {', '.join(known)}")
        return given

    return parse
