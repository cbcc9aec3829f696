"""When a run is saved, and how it goes on from what was saved."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from mpisjax.training import checkpoints, record
from mpisjax.training.checkpoints import Checkpoint, CheckpointWriter
from mpisjax.training.processes import run_on_primary
from mpisjax.training.record import Origin, Progress

LONGEST_INTERVAL = 600.0  # seconds, unless more is asked for
_log = logging.getLogger(__name__)


def saving_interval(least: float, elapsed: float) -> float:
    """Seconds from one save to the next: `least` at first, later a twentieth of the run so far.

    It grows to 30 times `least` and to ten minutes at most. A longer `least` is taken as it is, and 0 stays 0.

    A save stops training for half a second. What a killed run has to repeat stays within a twentieth of what it has done.
    """
    return max(least, min(elapsed / 20, 30 * least, LONGEST_INTERVAL))


class Saver(contextlib.AbstractContextManager):
    """Saves one run.

    Args:
        directory: Where the run's checkpoints lie.
        origin: What the run is made of.
        keep: How many of the latest checkpoints stay on disk, beside the best one.
        seconds: The least time between the saves of two epochs' ends.

    Attributes:
        step: The step that was saved last, or that the run goes on from; 0 for none.
    """

    def __init__(self, directory: Path, origin: Origin, keep: int, seconds: float) -> None:
        self._origin, self._seconds = origin, seconds
        self._writer = CheckpointWriter(directory, keep)
        self._last: Checkpoint | None = None
        self._saved_at = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    @property
    def step(self) -> int:
        return 0 if self._last is None else self._last.step

    def resume(self, state: Any) -> tuple[Any, Progress]:
        """The state and the progress of the newest sound checkpoint; those given, and none made, where there is none.

        Args:
            state: The state at step 0, which is the template for the one that is restored.

        Raises:
            UserError: The checkpoint belongs to another config or to other data, or all are damaged.
        """
        found = self._writer.newest()
        if found is None:
            return state, Progress()
        run_on_primary(lambda: record.check(found, self._origin))
        self._last = found
        return checkpoints.restore(found, state), record.progress_of(found)

    def due(self, elapsed: float) -> bool:
        """Whether an epoch's end is to be saved, `elapsed` seconds into the run; the first process's clock decides."""
        return run_on_primary(
            lambda: time.monotonic() - self._saved_at >= saving_interval(self._seconds, elapsed)
        )

    def save(self, step: int, state: Any, progress: Progress) -> None:
        """Writes the state and the progress; where this state is on disk already, the progress alone.

        Raises:
            UserError: The disk is full or the folder cannot be written.
        """
        content = record.content(self._origin, progress)
        if self._last is not None and self._last.step == step:
            self._last = checkpoints.update(self._last, content)
            return
        self._last = self._writer.save(step, state, content, best=progress.best_step)
        self._saved_at = time.monotonic()
