"""What a run measured: on disk, and watched for what a user must know.

On disk it is `metrics.jsonl` (one JSON object a line) and TensorBoard event files.

The JSONL file is the record: its length is noted in every checkpoint, and a run that resumes cuts it back to
that length, so that it neither repeats nor lacks a line. Rows are of three kinds: "train" (means over the
steps since the row before), "validation" and "test". All but the fields in `TIMING` are reproduced bit for
bit by a resumed run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpisjax.errors import UserError
from mpisjax.storage import processes, run_folder
from mpisjax.storage.processes import run_on_primary

T = TypeVar("T")
FILE_NAME = "metrics.jsonl"
SOLVERS = ("forward", "adjoint")
TIMING = ("images_per_second", "seconds", "tflops", "flop_utilisation")
_log = logging.getLogger(__name__)


def average(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Means over training steps; steps that were not finite are counted in `skipped_steps` and left out of
    the means.

    Args:
        rows: One dict of a step's metrics each, all with the same keys, `finite` (0 or 1) among them.

    Returns:
        The mean of every key over the finite steps (None where there is none), and `skipped_steps`.
    """
    finite = [row for row in rows if row["finite"] >= 0.5]
    means: dict[str, float | None] = {
        key: sum(row[key] for row in finite) / len(finite) if finite else None
        for key in rows[0]
        if key not in ("finite", "skipped")
    }
    means["skipped_steps"] = float(len(rows) - len(finite))
    return means


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; an empty list where there is none, and a torn last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """Appends rows to `metrics.jsonl` and to TensorBoard, and can be cut back to an earlier length.

    Of several processes the first one writes, and all hear of a full disk; every process must make each call.

    Args:
        workdir: The run's folder, on a disk or in a bucket.
        length: Bytes of `metrics.jsonl` to keep (what a checkpoint noted; 0 for a new run); the rest is cut
            off.
        step: The step the run goes on from; TensorBoard is told to forget what lies beyond.

    Raises:
        UserError: Here and in every call: the disk is full or the folder cannot be written.
    """

    def __init__(self, workdir: Path, length: int = 0, step: int = 0) -> None:
        self._workdir = workdir

        def start() -> None:
            local = run_folder.local_of(workdir)
            path = local / FILE_NAME
            self._file = open(path, "ab")  # noqa: SIM115 (held open for the length of the run)
            size = os.path.getsize(path)
            if size < length:
                _log.warning("%s is shorter than the checkpoint says: rows before step %d are missing", path, step)
            self._file.truncate(min(size, length))
            self._file.seek(0, os.SEEK_END)
            self._events = _open_events(local / "tensorboard", step)

        self._on_primary(start)

    def write(self, kind: str, step: int, row: dict[str, Any]) -> None:
        """Appends one row.

        Args:
            kind: "train", "validation" or "test".
            step: Training steps taken.
            row: Numbers, or dicts of them by stream or layer; one that is not finite becomes null.
        """

        def append() -> None:
            line = json.dumps({"kind": kind, "step": step, **plain(row)}, allow_nan=False) + "\n"
            self._file.write(line.encode())
            self._file.flush()
            self._events.write(_event(kind, step, row))
            self._events.flush()

        self._on_primary(append)

    def sync(self) -> int:
        """Forces the rows to the disk, or to the bucket; gives the length of `metrics.jsonl` in bytes."""

        def force() -> int:
            os.fsync(self._file.fileno())
            run_folder.push(self._workdir)
            return self._file.tell()

        return self._on_primary(force)

    def close(self) -> None:
        """Closes the files."""
        if not processes.is_primary():
            return
        try:
            self._file.close()
            self._events.close()
        except OSError as error:
            _log.warning("%s: the last rows were not written (%s)", self._workdir, error.strerror)

    def _on_primary(self, fn: Callable[[], T]) -> T:
        """As `run_on_primary`, with a sentence for the disk's errors."""

        def told() -> T:
            try:
                return fn()
            except OSError as error:
                raise UserError(
                    f"metrics cannot be written to {self._workdir} ({error.strerror}); free some space or mend its "
                    "permissions, and run the same command to go on from the last checkpoint"
                ) from error

        return run_on_primary(told)


def plain(value: Any) -> Any:
    """A number, or a dict of them, as JSON takes it: null stands for one that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _open_events(folder: Path, step: int) -> Any:
    # Imported here, since it takes a quarter of a second. The writer is synchronous, so a full disk raises at the row
    # that it has no room for.
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(exist_ok=True)
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{step}"
    events = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115 (held open for the length of the run)
    restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    for event in (event_pb2.Event(file_version="brain.Event:2"), event_pb2.Event(step=step + 1, session_log=restart)):
        events.write(event.SerializeToString())
    events.flush()
    return events


def _event(kind: str, step: int, row: dict[str, Any]) -> bytes:
    from tensorboard.compat.proto import event_pb2, summary_pb2

    values = []
    for key, value in row.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float):
                tag = "/".join(part for part in (kind, key, name) if part)
                values.append(summary_pb2.Summary.Value(tag=tag, simple_value=number))
    event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))
    return event.SerializeToString()


class DivergenceError(UserError):
    """Training stopped because too many steps in a row were not finite."""


class DivergenceMonitor:
    """Counts what goes wrong. Of a solver it tells the first time, and all times at the end; of skipped steps every
    epoch.

    Args:
        max_skipped: Steps in a row that are not finite after which to stop.
        adjoint_tol: The relative residual up to which the adjoint solve counts as converged; None for no limit.
        spikes_tol: The relative residual up to which a simulation counts as converged; None where rates are solved for.
    """

    def __init__(self, max_skipped: int, adjoint_tol: float | None = None, spikes_tol: float | None = None) -> None:
        self._max_skipped, self._adjoint_tol, self._spikes_tol = max_skipped, adjoint_tol, spikes_tol
        self._warned: set[str] = set()
        self._last_residual = math.nan
        self._steps = self._epoch_steps = self._skipped = 0
        self._failures = dict.fromkeys(SOLVERS, 0)
        self._worst = dict.fromkeys(SOLVERS, 0.0)

    def look(self, rows: Sequence[dict[str, float]], step: int) -> None:
        """Looks at the metrics of some steps, the last of which is number `step`.

        Raises:
            DivergenceError: `max_skipped` steps in a row were not finite.
        """
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            self._steps += 1
            self._epoch_steps += 1
            if row.get("forward_converged", 1.0) < 1.0:
                self._count("forward", row["forward_residual"], number)
            if self._adjoint_tol is not None and not row["adjoint_residual"] <= self._adjoint_tol:
                self._count("adjoint", row["adjoint_residual"], number)
            if row["finite"] < 0.5:
                self._skipped += 1
                if self._skipped == 1:
                    _log.warning("step %d gave a loss or gradient that is not finite; it is skipped", number)
            elif "forward_residual" in row:
                self._last_residual = row["forward_residual"]
            if row["skipped"] >= self._max_skipped:
                known = {"learning rate": f"{row['learning_rate']:.3g}"}
                known["last finite forward residual"] = f"{self._last_residual:.2g}"
                facts = ", ".join(f"{name} {value}" for name, value in known.items() if value != "nan")
                raise DivergenceError(
                    f"training stopped at step {number}: {row['skipped']:.0f} steps in a row gave a loss or gradient "
                    "that is not finite" + (f" ({facts})" if facts else "")
                )

    def end_epoch(self, epoch: int) -> None:
        """Reports an epoch's steps that were skipped."""
        if self._skipped:
            said = "epoch %d: %d of %d steps were not finite and were skipped"
            _log.warning(said, epoch, self._skipped, self._epoch_steps)
        self._epoch_steps = self._skipped = 0

    def end_run(self) -> None:
        """Reports how often the solvers did not converge, of the steps of this process."""
        for solver in SOLVERS:
            if self._failures[solver]:
                _log.info(
                    "the %s solver stopped above its tolerance for some samples in %d of %d steps (largest residual "
                    "%.2g, the mean of a batch)",
                    solver, self._failures[solver], self._steps, self._worst[solver],
                )  # fmt: skip

    def _count(self, solver: str, residual: float, step: int) -> None:
        self._failures[solver] += 1
        self._worst[solver] = max(self._worst[solver], residual)
        if solver not in self._warned:
            self._warned.add(solver)
            what, more = f"the {solver} solver has", f"{solver}.max_steps"
            if solver == "forward" and self._spikes_tol is not None:
                what, more = f"the spikes' rates (forward.residual_tol {self._spikes_tol:g}) have", "forward.num_steps"
            _log.warning(
                "step %d: %s not converged for every sample (residual %.2g in the mean). The gradient is then "
                "approximate, which training bears while the residual is well below 1; %s takes more steps. How often "
                "it happened is told at the end",
                step, what, residual, more,
            )  # fmt: skip
