"""The checkpoints of a run: which is the newest sound one, and which are no longer needed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpisjax.errors import UserError
from mpisjax.training import checkpoints
from mpisjax.training.checkpoints import RECORD_NAME, STEP_NAME, Checkpoint, DamagedError
from mpisjax.training.processes import count, first_does, is_first
from mpisjax.training.storage import is_bucket, path_of

_log = logging.getLogger(__name__)


def newest(directory: Path, *, set_aside: bool) -> Checkpoint | None:
    """The newest sound checkpoint; a warning names each newer one that is damaged.

    Args:
        directory: Where the checkpoints of a run lie.
        set_aside: Whether damaged ones are renamed to `step_N.damaged`, as a run that goes on from here
            needs.

    Returns:
        The checkpoint, or None where there is none, sound or damaged.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    return found_by_first(lambda: newest_here(directory, set_aside=set_aside))


def found_by_first(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint that `find` finds in the first process, in all of them."""

    def told() -> Any:
        found = find()
        return found and [os.fspath(found.path), *found[1:]]

    if count() == 1:
        return find()
    found = first_does(told)
    return Checkpoint(path_of(found[0]), *found[1:]) if found else None


def newest_here(directory: Path, *, set_aside: bool) -> Checkpoint | None:
    """What `newest` finds in the first process; for callers that only the first process runs."""
    broken: list[Path] = []
    sound = None
    for step in reversed(checkpoints.steps(directory)):
        try:
            sound = checkpoints.read(directory, step)
            break
        except DamagedError as error:
            broken.append(directory / f"step_{step:08d}")
            _log.warning("checkpoint of step %d is damaged and is passed over: %s", step, error)
    if broken and sound is None:
        raise UserError(
            f"all checkpoints in {directory} are damaged; delete the folder to start the run again"
        )
    for path in broken if set_aside else ():
        if is_bucket(path):  # without its record it does not count; the rest goes when it is outrun
            (path / RECORD_NAME).unlink()
            continue
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    return sound


def tidy(directory: Path, *, keep: int, also: int | None = None) -> None:
    """Removes what is no longer needed: drafts of dead runs, old checkpoints, damaged ones that have been
    outrun.

    Args:
        directory: Where the checkpoints of a run lie.
        keep: How many of the latest to keep.
        also: The step of one more to keep (the best by validation).
    """
    if not is_first():
        return
    present = checkpoints.steps(directory)
    for step in present[:-keep]:
        if step != also:
            checkpoints.remove(directory / f"step_{step:08d}")
    if is_bucket(directory):
        for path in directory.iterdir() if directory.exists() else ():
            match = STEP_NAME.fullmatch(path.name)
            if match and present and int(match[1]) < present[-1] and int(match[1]) not in present:
                path.rmtree()  # type: ignore[attr-defined]
        return
    for path in directory.glob(".*_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob("step_*.damaged"):
        if present and int(path.stem.removeprefix("step_")) <= present[-1]:
            shutil.rmtree(path, ignore_errors=True)
