"""How and when a run is saved: orbax's `CheckpointManager`, and the clock.

Orbax writes a checkpoint whole or not at all, removes old ones and what a killed run left half written, and knows
buckets.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpisjax.storage import checkpoints, packing, processes, record
from mpisjax.storage.checkpoints import STATE_NAME, Checkpoint
from mpisjax.storage.processes import run_on_primary
from mpisjax.storage.record import Origin, Progress
from mpisjax.storage.run_folder import is_bucket

LONGEST_INTERVAL = 600.0  # seconds, unless more is asked for
OVERHEAD = 2**16  # bytes of a checkpoint beside its arrays, amply


def saving_interval(least: float, elapsed: float) -> float:
    """Seconds from one save to the next: `least` at first, later a twentieth of the run so far.

    It grows to 30 times `least` and to ten minutes at most. A longer `least` is taken as it is, and 0 stays 0.

    A save stops training for half a second. What a killed run has to repeat stays within a twentieth of what it has
    done.
    """
    return max(least, min(elapsed / 20, 30 * least, LONGEST_INTERVAL))


@contextlib.contextmanager
def _tracebacks_left_out() -> Iterator[None]:
    """Leaves tracebacks out of the libraries' log: orbax's threads log what `save` raises."""

    def plain(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    log = logging.getLogger("absl")
    log.addFilter(plain)
    try:
        yield
    finally:
        log.removeFilter(plain)


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Writes a state, and the record when all files of the state are there."""

    record: Checkpoint

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        checkpoints.write_record(self.record._replace(path=directory.parent), checkpoints.digests(directory, sync=True))


class CheckpointWriter(contextlib.AbstractContextManager):
    """Writes the checkpoints of one run; every process of the run makes one and calls it at the same points.

    Args:
        directory: Where the checkpoints lie; made where it is missing. What a killed run left half written is removed.
        keep: How many of the latest checkpoints stay on disk.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = checkpoints.absolute(directory)
        self._keep = keep
        # Compressed weights are a few percent smaller, and leave more memory behind.
        self._handler = _StateHandler(use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(STATE_NAME, ocp.args.PyTreeSave, self._handler)
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            step_format_fixed_length=8,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
            save_root_metadata=False,
            lightweight_initialize=True,  # else each checkpoint of an earlier version is warned of
        )
        try:
            run_on_primary(self._commit)
            self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)
        except Exception as error:
            raise checkpoints.storage_error(error, self.directory, 0) from error

    def _commit(self) -> None:
        """In a bucket, gives orbax's mark to checkpoints that have their record: a run was killed between the two."""
        for step in checkpoints.steps(self.directory) if is_bucket(self.directory) else ():
            mark = checkpoints.path_of_step(self.directory, step) / checkpoints.COMMIT_NAME
            if not mark.exists():
                mark.write_text("")

    def __exit__(self, *error: object) -> None:
        """Ends orbax's threads."""
        self._manager.close()

    def save(self, step: int, state: Any, content: dict[str, Any], best: int = 0) -> Checkpoint:
        """Writes a checkpoint; afterwards it is whole under its name, or the folder is as it was.

        Args:
            step: Training steps taken so far; names the checkpoint.
            state: Any pytree of arrays.
            content: Anything that JSON can hold.
            best: The step of a checkpoint to keep beside the latest ones.

        Returns:
            The checkpoint.

        Raises:
            UserError: The disk is full or the folder cannot be written. Earlier checkpoints stand.
        """
        impls, arrays = packing.without_keys(state)
        layout, path = packing.layout_of(arrays), checkpoints.path_of_step(self.directory, step)
        made = Checkpoint(path, step, layout, content, impls)
        self._handler.record = made
        try:
            if step in self._manager.all_steps():  # what stands there is not what this run continues from
                self._manager.delete(step)
            self._check_space(arrays)
            saved = ocp.args.PyTreeSave(packing.pack(arrays))
            with _tracebacks_left_out():
                self._manager.save(step, args=ocp.args.Composite(**{STATE_NAME: saved}), force=True)
            for old in [other for other in self._manager.all_steps()[: -self._keep] if other != best]:
                self._manager.delete(old)
        except Exception as error:
            if processes.is_primary() and not is_bucket(self.directory):
                for draft in self.directory.glob("step_*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(draft, ignore_errors=True)
            raise checkpoints.storage_error(error, self.directory, step) from error
        return made

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint, as `checkpoints.newest`; damaged ones after it are removed."""
        found = checkpoints.newest(self.directory)
        for step in self._manager.all_steps():
            if found is not None and step > found.step:
                self._manager.delete(step)
        return found

    def _check_space(self, arrays: Any) -> None:
        """Refuses to begin what the disk cannot hold; a write that fails half way through leaves its threads behind."""
        needed = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if not is_bucket(self.directory) and shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
        self._writer.__exit__(*error)

    @property
    def step(self) -> int:
        return 0 if self._last is None else self._last.step

    def resume(self, state: Any, steps_per_epoch: int) -> tuple[Any, Progress]:
        """The state and the progress of the newest sound checkpoint; those given, and none made, where there is none.

        Args:
            state: The state at step 0, which is the template for the one that is restored.
            steps_per_epoch: Says whether the run was complete; it then goes on where `train.epochs` is raised.

        Raises:
            UserError: The checkpoint belongs to another config or to other data, or all are damaged.
        """
        found = self._writer.newest()
        if found is None:
            return state, Progress()
        longer = run_on_primary(lambda: record.check(found, self._origin, steps_per_epoch))
        self._last, progress = found, record.progress_of(found)
        return checkpoints.restore(found, state), progress._replace(ended=progress.ended and not longer)

    def due(self, elapsed: float) -> bool:
        """Whether an epoch's end is to be saved, `elapsed` seconds into the run; the first process's clock decides."""
        return run_on_primary(lambda: time.monotonic() - self._saved_at >= saving_interval(self._seconds, elapsed))

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
