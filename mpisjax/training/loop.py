"""The training loop: steps, validation once an epoch, checkpoints, and the right answer to whatever interrupts it.

The loop knows nothing of the model. The state together with the step number is the whole of a run: batches come from
(seed, step), so a run restored at step s goes on exactly as it would have gone on. What a row of metrics needs beyond
that, the steps since the last row, is kept in the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, processes, record, run_folder
from mpisjax.storage.checkpoints import FOLDER
from mpisjax.storage.preemption import Preempted, Stopper
from mpisjax.storage.processes import run_on_primary
from mpisjax.storage.record import Progress
from mpisjax.storage.run_folder import write_atomically
from mpisjax.storage.saving import Saver
from mpisjax.training.console import Display, display
from mpisjax.training.metrics import DivergenceError, DivergenceMonitor, MetricsLog, average
from mpisjax.training.step_runner import Meter, StepRunner, Tracer

RESULTS_NAME = "results.json"
ADVICE = (
    "lower config.train.learning_rate, set config.train.jacobian_penalty, or damp the rate solver "
    "(config.forward.mode=rates with config.forward.damping=0.5)"
)
_log = logging.getLogger(__name__)


EvalFn = Callable[[Any], Any]  # of a state: a NamedTuple of measurements such as `Evaluation`
OnEpoch = Callable[[Any, Mapping[str, Any]], bool | None]


class StopTraining(Exception):
    """Raised in `on_epoch`, it ends the training as an answer of True does."""


class LoopSettings(NamedTuple):
    """The numbers that the loop needs.

    Attributes:
        epochs: Epochs to train.
        batch_size: Examples in a batch; for the rate in images a second.
        log_every: Steps from one row of metrics to the next, counted anew in every epoch.
        checkpoint_every: Steps from one save to the next within an epoch; 0: only the ends of epochs are saved.
        checkpoint_seconds: An epoch's end is saved when so much time has passed since the last save (see
            `saving.saving_interval`), when its state is the best so far, and when it is the last.
        keep_checkpoints: How many of the latest checkpoints stay on disk, beside the best one.
        max_skipped: Steps in a row that are not finite after which the run stops.
        patience: Epochs without a better validation after which training ends; 0: it goes on to the last epoch.
    """

    epochs: int
    batch_size: int
    log_every: int = 50
    checkpoint_every: int = 0
    checkpoint_seconds: float = 20.0
    keep_checkpoints: int = 2
    max_skipped: int = 10
    patience: int = 0


@dataclasses.dataclass
class TrainingRun:
    """A run in hand: its state, how far it has come, and what it writes."""

    settings: LoopSettings
    workdir: Path
    saver: Saver
    steps: StepRunner
    steps_per_epoch: int
    stopper: Stopper
    monitor: DivergenceMonitor
    tracer: Tracer
    meter: Meter | None
    diagnose: Callable[[Any, int], str] | None
    on_epoch: OnEpoch | None
    on_end: Callable[[Path], None] | None
    state: Any
    progress: Progress

    def __post_init__(self) -> None:
        self.step = self.saver.step
        self.total = self.settings.epochs * self.steps_per_epoch
        if self.step:
            _log.info("going on from the checkpoint of step %d of %d", self.step, self.total)
        if self._out_of_patience:
            _log.warning(
                "training has ended, since %d epochs brought nothing better: raise train.patience to go on",
                (self.progress.validated_step - self.progress.best_step) // self.steps_per_epoch,
            )
        self.began = time.monotonic() - self.progress.seconds
        self.stepped = self.told = False
        self.rows = MetricsLog(self.workdir, self.progress.metrics_length, self.step)

    def close(self) -> None:
        self.tracer.close(self.state)
        self.rows.close()

    @property
    def complete(self) -> bool:
        """Whether no step is left to take."""
        return self.step >= self.total or self.progress.ended or self._out_of_patience

    @property
    def _out_of_patience(self) -> bool:
        """Whether the last validations have brought nothing better for `patience` epochs."""
        patience, progress = self.settings.patience * self.steps_per_epoch, self.progress
        return 0 < patience <= progress.validated_step - progress.best_step

    @property
    def at_end_of_epoch(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def train(self, eval_fn: EvalFn | None) -> bool:
        """Steps and validates up to the last step; says whether it was stopped before."""
        silent = None if processes.is_primary() else io.StringIO()
        with display(self.total, self.steps_per_epoch, self.step, silent) as screen:
            while True:
                if self.at_end_of_epoch and self.progress.validated_step != self.step:
                    if self.step >= self.total or self.saver.due(time.monotonic() - self.began):
                        self._save()  # first, so that nothing is lost if validation is cut short
                    if eval_fn is None:
                        self._end_epoch({})
                        screen.epoch("")
                    elif not self._validate(eval_fn, screen):
                        self._save()
                        return self._stop()
                if self.complete:
                    return False
                # With several processes all stop where all know that one of them was asked to.
                if self.stopper.requested is not None if processes.count() == 1 else self.steps.outvoted:
                    self._collect()
                    self._save()
                    return self._stop()
                self._advance(screen)

    def _interruptible(self) -> contextlib.AbstractContextManager[None]:
        """A signal ends an evaluation at once; several processes go on to its end, since they need one another."""
        return self.stopper.interruptible() if processes.count() == 1 else contextlib.nullcontext()

    def _stop(self) -> bool:
        name = self.stopper.requested or "a signal to another process"
        _log.warning("stopped by %s after step %d of %d; run the same command to go on", name, self.step, self.total)
        return True

    def _advance(self, screen: Display) -> None:
        """Takes a step, and does what is due after it."""
        first, self.stepped = not self.stepped, True
        if self.progress.test is not None:  # of a run that was complete, and goes on with more epochs or patience
            self.progress = self.progress._replace(test=None)
        self.tracer.before_step(self.state)
        self.state = self.steps.run(self.state, self.step, self.stopper.requested is not None)
        self.step += 1
        in_epoch = self.step % self.steps_per_epoch
        row_due = in_epoch % self.settings.log_every == 0 or self.at_end_of_epoch
        every = self.settings.checkpoint_every
        save_due = every > 0 and self.step % every == 0 and not self.at_end_of_epoch
        if self.steps.waits or row_due or first or save_due:
            self._collect()
        if row_due:
            means, rate = self._write_row()
            screen.step(self.step, means, rate, due=True)
        else:
            pending = self.progress.pending
            screen.step(self.step, pending[-1] if pending else None, None, due=False)
        if self.at_end_of_epoch:
            self.monitor.end_epoch(self.step // self.steps_per_epoch)
        if save_due:
            self._save()

    def _collect(self) -> None:
        """Brings the metrics of the steps in flight here, and stops a run that has diverged."""
        rows = self.steps.collect()
        self.progress = self.progress._replace(pending=(*self.progress.pending, *rows))
        try:
            self.monitor.look(rows, self.step)
        except DivergenceError as error:
            self._save()
            more = f"; {self.diagnose(self.state, self.step)}" if self.diagnose is not None else ""
            raise DivergenceError(
                f"{error}{more}; {ADVICE}; the last good state is in {self.workdir / FOLDER}"
            ) from None

    def _write_row(self) -> tuple[Mapping[str, float | None], float | None]:
        """Writes the means over the steps since the last row; gives them, and the rate in images a second."""
        means = average(self.progress.pending)
        rate = self.steps.rate(self.settings.batch_size)
        timing = {"images_per_second": rate, "seconds": time.monotonic() - self.began}
        if self.meter is not None and (work := self.meter(means, rate)) is not None:
            timing |= {"tflops": work.tflops, "flop_utilisation": work.utilisation}
            if not self.told and work.utilisation is not None:  # once a process; the rows have the rest
                self.told = True
                share = 100 * work.utilisation
                _log.info("%.3g TFLOP/s in convolutions and matrix products, %.2g%% of the peak", work.tflops, share)
        self.rows.write("train", self.step, {"epoch": self.step / self.steps_per_epoch, **means, **timing})
        self.progress = self.progress._replace(pending=())
        return means, rate

    def _validate(self, eval_fn: EvalFn, screen: Display) -> bool:
        """Measures the state on the validation split; says False where a signal came first."""
        try:
            with self._interruptible():
                score = eval_fn(self.state)
        except Preempted:
            return False
        epoch, validation = self.step // self.steps_per_epoch, score._asdict()
        self.rows.write("validation", self.step, {"epoch": epoch, **validation})
        self.progress = self.progress.with_validation(self.step, validation)
        self._end_epoch(validation)
        saved = self.progress.ended  # then it is on disk already
        if not saved and (self._out_of_patience or self.step in (self.progress.best_step, self.saver.step)):
            self._save()
        best, at = 100 * (self.progress.best_accuracy or 0.0), self.progress.best_step // self.steps_per_epoch
        ends = f"; training ends, train.patience is {self.settings.patience}" if self._out_of_patience else ""
        screen.epoch(f"validation {100 * validation['accuracy']:.2f}% (best {best:.2f}% in epoch {at}{ends})")
        return True

    def _end_epoch(self, validation: Mapping[str, Any]) -> None:
        """Asks `on_epoch` whether this was the last epoch, and saves the state if it says so."""
        self.progress = self.progress._replace(validated_step=self.step)
        if self.on_epoch is None:
            return
        epoch = self.step // self.steps_per_epoch
        try:
            ends = self.on_epoch(self.state, {"epoch": epoch, "step": self.step, **validation})
        except StopTraining:
            ends = True
        if run_on_primary(lambda: bool(ends)):
            self.progress = self.progress._replace(ended=True)
            self._save()

    def _save(self) -> None:
        if int(self.state.step) != self.step:
            raise RuntimeError(f"the state says step {int(self.state.step)} after {self.step} steps")
        with self.stopper.saving():
            length, seconds = self.rows.sync(), time.monotonic() - self.began
            self.progress = self.progress._replace(metrics_length=length, seconds=seconds)
            self.saver.save(self.step, self.state, self.progress)

    def finish(self, test_fn: EvalFn | None) -> bool:
        """Measures the test split once, with the best state, and ends the run; says whether it was stopped."""
        self.monitor.end_run()
        if test_fn is not None and self.progress.test is None:
            chosen = record.best(self.workdir)
            state = self.state if chosen.step == self.step else checkpoints.restore(chosen, self.state)
            try:
                with self._interruptible():
                    score = test_fn(state)
            except Preempted:
                return self._stop()
            test = {"checkpoint_step": chosen.step, **score._asdict()}
            self.rows.write("test", self.step, test)
            self.progress = self.progress._replace(test=test)
            self._save()
        run_on_primary(self._conclude)
        return False

    def _conclude(self) -> None:
        local = run_folder.local_of(self.workdir)
        try:
            if self.progress.test is not None:
                results = json.dumps(self.progress.test, indent=1) + "\n"
                write_atomically(local / RESULTS_NAME, results.encode())
            if self.on_end is not None:
                self.on_end(local)
            run_folder.push(self.workdir)
        except OSError as error:
            raise UserError(
                f"results cannot be written to {self.workdir} ({error.strerror}); training itself is complete: free "
                "some space or mend its permissions, and run the same command again"
            ) from error
