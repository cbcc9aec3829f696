"""The command line: how programs start and end, `mpisjax.cli.main` and its commands.

Their flags and config are parsed, and whatever a user can mend is said in one sentence.

A mistake on the command line is exit code 2 (`mpisjax.cli.arguments`, `mpisjax.configuration.config_files`), anything
else that a user can mend exit code 1.

Importing this module imports no JAX: programs choose their devices between parsing the command line and importing it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import importlib.metadata
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import ml_collections
from absl import logging as absl_logging

from mpisjax.cli.arguments import whole_number
from mpisjax.configuration.config_files import apply_overrides, one_line, sort_arguments
from mpisjax.errors import UserError
from mpisjax.storage.preemption import SIGNALS, Preempted

# The versions of JAX that the tests were run with: from the first, up to but without the second.
JAX_VERSIONS = ("0.10", "0.13")
_log = logging.getLogger(__name__)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run that several processes share."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator", help="HOST:PORT of the first process (not needed on Cloud TPU)")
    group.add_argument("--num_processes", type=int, help="how many processes share the run")
    group.add_argument("--process_id", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat_seconds",
        type=whole_number(5),
        default=60,
        help="silence after which a process counts as dead",
    )


def prepare(given: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    """Settles devices and processes as these flags and the config say; before anything makes JAX look for them."""
    from mpisjax.configuration.makers import prepare_cores
    from mpisjax.storage import processes
    from mpisjax.training import devices

    prepare_cores(config)
    processes.initialize(given.coordinator, given.num_processes, given.process_id, given.heartbeat_seconds)
    devices.compilation_cache()


def run(
    main: Callable[[argparse.Namespace, ml_collections.ConfigDict], int | None],
    parser: argparse.ArgumentParser,
    make_config: Callable[[argparse.Namespace, str | None], ml_collections.ConfigDict],
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Runs a program with a config to its exit code: 0, what `main` gives, or 1 or 2 and one sentence.

    Args:
        main: Takes the flags and the config.
        parser: Of the program's own flags.
        make_config: Takes them and what `--config` names (None without it), and gives the config without overrides.
        arguments: The command line without the program's name; this process's own by default.
    """
    faulthandler.enable()
    try:
        found = sort_arguments(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        parser.error(str(error))
    given = parser.parse_args(found.others)
    given.overrides = found.overrides
    with report_user_errors():
        config = make_config(given, found.config_file)
    try:
        config = apply_overrides(config, found.overrides)
    except UserError as error:
        parser.error(str(error))
    set_up_log()
    with report_user_errors():
        check_jax(importlib.metadata.version("jax"))
        sys.exit(main(given, config))
    raise AssertionError("report_user_errors returned")


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
    """The sentence for an error that the user can mend, None for any other."""
    text = one_line(error)
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
        return f"cannot write or read {error.filename or 'a file'} ({error.strerror}); mend that and run again"
    return None


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Tells what a user can mend in one sentence on standard error, and exits with 1."""
    try:
        yield
    except Exception as error:
        # Python 3.11 makes a RuntimeError of whatever is raised while a class body of an import is being finished.
        if isinstance(error.__cause__, Preempted):
            _leave(error.__cause__)
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Preempted as stop:
        _leave(stop)


def _leave(stop: Preempted) -> NoReturn:
    # A second signal must not turn the orderly end into a death.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    print(f"stopped by {stop}; run the same command to go on", file=sys.stderr, flush=True)
    sys.exit(0)


def set_up_log() -> None:
    """Shows the package's log as plain sentences, and of the libraries' (through absl) only warnings."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("mpisjax")
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    logger.addHandler(screen)
    logger.setLevel(logging.INFO)
    logger.propagate = False
