"""The command lines of the programs beside `train.py` and `evaluate.py`: flags with underscores, mistakes in a sentence.

A mistyped flag or value is one sentence on standard error and exit code 2. `--help` shows every flag with its default.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `argparse` parser that tells a mistake in one sentence, and whose flags are never abbreviated.

    Args:
        program: What starts the program, such as "python -m mpisjax.export".
        description: The docstring of the program, shown as it is.
    """

    def __init__(self, program: str, description: str | None, **settings: Any) -> None:
        super().__init__(
            prog=program,
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
            **settings,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The flags as a namespace; exits with 2 where a flag or a value is none."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return given

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"error: {message.removeprefix('argument ')}; --help lists the flags\n")

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        flag = argument.split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"there is no flag {flag}" + (f"; did you mean {near[0]}?" if near else "")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and defaults where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, True, "") or action.required:
            return action.help
        return super()._get_help_string(action)


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


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """The type of a flag that is several of some names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(part for part in text.split(",") if part)
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose from {', '.join(known)}")
        return given

    return parse
