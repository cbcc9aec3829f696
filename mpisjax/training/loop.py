"""The training loop: steps, validation once an epoch, checkpoints, and the right answer to whatever
interrupts it.

The loop knows nothing of the model. It holds that the state together with the step number is the whole of a
run: batches come from (seed, step), so a run restored at step s goes on exactly as it would have gone on. What
a row of metrics needs beyond that (the steps since the last row) is kept in the checkpoint, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mpisjax.errors import UserError
from mpisjax.training import checkpoints, plots, processes, profiling, record, storage, upkeep
from mpisjax.training.durable import write_atomically
from mpisjax.training.health import DivergenceError, Health
from mpisjax.training.lock import hold
from mpisjax.training.metrics import FILE_NAME, MetricsLog, average, read_rows
from mpisjax.training.pipeline import Feed, Pipeline, TrainStep
from mpisjax.training.preemption import Preempted, Stopper, watch
from mpisjax.training.processes import first_does
from mpisjax.training.profiling import Meter, Tracer, Work
from mpisjax.training.progress import Display, display

CURVES_NAME = "curves.png"
RESULTS_NAME = "results.json"
ADVICE = (
    "lower config.train.learning_rate, set config.train.jacobian_penalty, or damp the rate solver "
    "(config.forward.mode=rates with config.forward.damping=0.5)"
)
_log = logging.getLogger(__name__)


class Score(Protocol):
    """What the loop needs of an evaluation; `mpisjax.training.evaluation.Evaluation` has it."""

    def _asdict(self) -> dict[str, Any]:
        """Every measurement, `accuracy` and `loss` among them: numbers, and dicts of numbers."""


EvalFn = Callable[[Any], Score]


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
        state: The training state after the last step.
        step: Steps taken since the run began, in this process and before.
        best_step: The step with the best validation accuracy, of equals the one with the lower loss; `step`
            without validation.
        best_accuracy: That accuracy; None without validation.
        test: The test split, measured once with the best state; None if the run was stopped or has no test.
        stopped: Whether a signal ended the run before its end.
    """

    state: Any
    step: int
    best_step: int
    best_accuracy: float | None
    test: Mapping[str, Any] | None
    stopped: bool


LONGEST_INTERVAL = 600.0  # seconds, unless more is asked for


def saving_interval(least: float, elapsed: float) -> float:
    """Seconds from one save to the next: `least` at first, later a twentieth of the run so far.

    It grows to 30 times `least` and to ten minutes at most; a longer `least` is taken as it is, and 0 stays 0.

    A save stops training for half a second and leaves a few kilobytes that are never freed (docs/robustness.md): every 20 s for
    a week that would be four hours and 150 MB, for little. What a killed run has to repeat stays within a twentieth of
    what it has done.
    """
    return max(least, min(elapsed / 20, 30 * least, LONGEST_INTERVAL))


def fit(
    config: Any,
    workdir: str | Path,
    *,
    state: Any,
    train_step: TrainStep,
    feed: Feed,
    eval_fn: EvalFn | None = None,
    test_fn: EvalFn | None = None,
    data_checksum: str = "",
    adjoint_tol: float | None = None,
    diagnose: Callable[[Any, int], str] | None = None,
    stopper: Stopper | None = None,
    meter: Meter | None = None,
    profile: bool = False,
) -> FitResult:
    """Trains to the end of `config.train.epochs`, from wherever the run in `workdir` stands.

    Args:
        config: The run's config; of it the loop reads `name` and, in `train`, `epochs`, `batch_size`,
            `log_every` (steps, counted anew in every epoch), `checkpoint_every` (steps; 0: at the end of epochs only),
            `checkpoint_seconds` (an epoch's end is saved when so much time has passed since the last save, see
            `saving_interval`, or the state is the best so far, or the last), `keep_checkpoints`, `max_skipped`.
        workdir: The run's folder; made where it is missing.
        state: The state at step 0 (a pytree of arrays); where a checkpoint is restored, the template for it.
        train_step: Takes (state, batch), gives (state, metrics); it may be given the state's buffers for
            good. The metrics are a NamedTuple of scalars, with `loss`, `accuracy`, `learning_rate`, `finite`
            (0 or 1: the step changed the parameters) and `skipped` (steps in a row that did not) at least.
        feed: The batches.
        eval_fn: Measures a state on the validation split.
        test_fn: Measures a state on the test split. It is called once, after the last step, with the best
            state.
        data_checksum: Identifies the data; a run is not continued on other data.
        adjoint_tol: The `adjoint_residual` up to which the adjoint solve counts as converged; None: no limit.
        diagnose: Takes (state, step) when training has diverged and gives a clause for the message.
        stopper: Who listens for signals; by default the loop itself does.
        meter: Says how much arithmetic the steps of an interval were.
        profile: Whether to trace a few steps into the folder.

    Returns:
        How the run ended.

    Raises:
        Preempted: A signal came before the folder was taken.
        UserError: The folder is in use or cannot be written, its checkpoints belong to another config or are
            all damaged, or the disk is full.
        DivergenceError: `train.max_skipped` steps in a row were not finite; the last good state has been saved.
    """
    with contextlib.ExitStack() as stack:
        stopper = stopper or stack.enter_context(watch())  # first: whoever sees the lock may send a signal
        stack.enter_context(stopper.deferred())
        path = stack.enter_context(hold(workdir))
        run = _Run(
            config,
            path,
            state,
            Pipeline(train_step, feed, state),
            feed.steps_per_epoch,
            data_checksum,
            Health(config.train.max_skipped, adjoint_tol),
            stopper,
            meter,
            Tracer(storage.local_of(path) / profiling.FOLDER if profile and processes.is_first() else None),
        )
        stack.callback(run.close)
        stopped = run.train(eval_fn, diagnose) or run.finish(test_fn)
        best = run.progress
        return FitResult(
            run.state, run.step, best.best_step or run.step, best.best_accuracy, best.test, stopped
        )


class _Run:
    """A run in hand: its state, how far it has come, and what it writes."""

    def __init__(
        self,
        config: Any,
        workdir: Path,
        state: Any,
        pipeline: Pipeline,
        steps_per_epoch: int,
        data_checksum: str,
        health: Health,
        stopper: Stopper,
        meter: Meter | None,
        tracer: Tracer,
    ) -> None:
        self._meter, self._tracer = meter, tracer
        self.state, self.step, self.progress = state, 0, record.Progress()
        self._config, self._settings, self._workdir = config, config.train, workdir
        self._directory, self._local = workdir / record.FOLDER, storage.local_of(workdir)
        self._pipeline, self._stopper = pipeline, stopper
        self._steps_per_epoch, self._total = steps_per_epoch, config.train.epochs * steps_per_epoch
        self._data_checksum = data_checksum
        self._health = health
        self._saved: checkpoints.Checkpoint | None = None
        self._saved_at = time.monotonic()
        self._stepped, self._told = False, False
        self._resume()
        self._began = time.monotonic() - self.progress.seconds
        # Of several processes the first writes; what follows from a full disk there, all must hear of.
        self._log: MetricsLog | None = None
        first_does(self._open_log)

    def _open_log(self) -> None:
        self._log = MetricsLog(self._local, length=self.progress.metrics_length, step=self.step)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        first_does(lambda: self._log.write(kind, self.step, row) if self._log else None)

    def _resume(self) -> None:
        found = upkeep.newest(self._directory, set_aside=True)
        if found is not None:
            first_does(lambda: record.check(found, self._config, self._data_checksum))
            self.state = checkpoints.restore(found, self.state)
            self.step, self.progress, self._saved = found.step, record.progress_of(found), found
            _log.info("going on from the checkpoint of step %d of %d", self.step, self._total)
        upkeep.tidy(self._directory, keep=self._settings.keep_checkpoints, also=self.progress.best_step)

    def close(self) -> None:
        self._tracer.close(self.state)
        if self._log is not None:
            self._log.close()

    def train(self, eval_fn: EvalFn | None, diagnose: Callable[[Any, int], str] | None) -> bool:
        """Steps and validates up to the last step; says whether it was stopped before."""
        silent = None if processes.is_first() else io.StringIO()
        with display(self._total, self._steps_per_epoch, self.step, silent) as screen:
            while True:
                ends_epoch = self.step > 0 and self.step % self._steps_per_epoch == 0
                if ends_epoch and self.progress.validated_step != self.step:
                    if self._due():
                        self._save()  # first, so that nothing is lost if validation is cut short
                    if eval_fn is not None and not self._validate(eval_fn, screen):
                        self._save()
                        return self._stop()
                if self.step >= self._total:
                    return False
                if self._wanted():
                    self._collect(diagnose)
                    self._save()
                    return self._stop()
                self._advance(screen, diagnose)

    def _wanted(self) -> bool:
        """Whether to stop here: with several processes, whether all know by now that one of them was asked to."""
        return self._stopper.requested is not None if processes.count() == 1 else self._pipeline.outvoted

    def _due(self) -> bool:
        """Whether the end of an epoch is to be saved whatever its validation says; the first process's clock decides."""

        def waited_enough() -> bool:
            now = time.monotonic()
            return now - self._saved_at >= saving_interval(
                self._settings.checkpoint_seconds, now - self._began
            )

        return self.step >= self._total or first_does(waited_enough)

    def _interruptible(self) -> contextlib.AbstractContextManager[None]:
        """A signal ends an evaluation at once; several processes go on to its end, since they need one another."""
        return self._stopper.interruptible() if processes.count() == 1 else contextlib.nullcontext()

    def finish(self, test_fn: EvalFn | None) -> bool:
        """Measures the test split once, with the best state, and draws the curves; says whether it was stopped."""
        if test_fn is not None and self.progress.test is None:
            chosen = record.best(self._workdir)
            state = self.state if chosen.step == self.step else checkpoints.restore(chosen, self.state)
            try:
                with self._interruptible():
                    score = test_fn(state)
            except Preempted:
                return self._stop()
            test = {"checkpoint_step": chosen.step, **score._asdict()}
            self._write("test", test)
            self.progress = self.progress._replace(test=test)
            self._save()
        first_does(self._conclude)
        return False

    def _conclude(self) -> None:
        try:
            if self.progress.test is not None:
                results = json.dumps(self.progress.test, indent=1) + "\n"
                write_atomically(self._local / RESULTS_NAME, results.encode())
            rows = read_rows(self._local / FILE_NAME)
            plots.save_curves(rows, self._local / CURVES_NAME, self._config.name, self._steps_per_epoch)
            storage.push(self._workdir)
        except OSError as error:
            raise UserError(
                f"results cannot be written to {self._workdir} ({error.strerror}); training itself is complete: free "
                "some space or mend its permissions, and run the same command again"
            ) from error

    def _advance(self, screen: Display, diagnose: Callable[[Any, int], str] | None) -> None:
        first, self._stepped = not self._stepped, True
        self._tracer.before_step(self.state)
        self.state = self._pipeline.run(self.state, self.step, self._stopper.requested is not None)
        self.step += 1
        in_epoch = self.step % self._steps_per_epoch
        ends_epoch = in_epoch == 0
        due = ends_epoch or in_epoch % self._settings.log_every == 0
        every = self._settings.checkpoint_every
        saves = every > 0 and self.step % every == 0 and not ends_epoch
        if self._pipeline.waits or due or first or saves:
            self._collect(diagnose)
        means: Mapping[str, float | None] | None = (
            self.progress.pending[-1] if self.progress.pending else None
        )
        rate: float | None = None
        if due:
            means = average(self.progress.pending)
            rate = self._pipeline.rate(self._settings.batch_size)
            seconds = time.monotonic() - self._began
            epoch = self.step / self._steps_per_epoch
            timing = {"images_per_second": rate, "seconds": seconds}
            if self._meter is not None and (work := self._meter(means, rate)) is not None:
                timing |= {"tflops": work.tflops, "flop_utilisation": work.utilisation}
                self._tell(work)
            self._write("train", {"epoch": epoch, **means, **timing})
            self.progress = self.progress._replace(pending=())
        screen.step(self.step, means, rate, due=due)
        if ends_epoch:
            self._health.end_epoch(self.step // self._steps_per_epoch)
        if saves:
            self._save()

    def _tell(self, work: Work) -> None:
        """Once a process: the rows have the rest."""
        if not self._told:
            self._told = True
            share = (
                "of a peak not known"
                if work.utilisation is None
                else f"{100 * work.utilisation:.2g}% of the peak"
            )
            _log.info("arithmetic: %.3g TFLOP/s of convolutions and matrix products, %s", work.tflops, share)

    def _collect(self, diagnose: Callable[[Any, int], str] | None) -> None:
        rows = self._pipeline.collect()
        self.progress = self.progress._replace(pending=(*self.progress.pending, *rows))
        try:
            self._health.look(rows, self.step)
        except DivergenceError as error:
            self._save()
            more = f"; {diagnose(self.state, self.step)}" if diagnose is not None else ""
            raise DivergenceError(
                f"{error}{more}; {ADVICE}; the last good state is in {self._directory}"
            ) from None

    def _validate(self, eval_fn: EvalFn, screen: Display) -> bool:
        try:
            with self._interruptible():
                score = eval_fn(self.state)
        except Preempted:
            return False
        epoch = self.step // self._steps_per_epoch
        validation = score._asdict()
        self._write("validation", {"epoch": epoch, **validation})
        self.progress = record.with_validation(self.progress, self.step, validation)
        if self.step in (self.progress.best_step, self._saved.step if self._saved else None):
            self._save()
        best_epoch = self.progress.best_step // self._steps_per_epoch
        best = f"best {100 * (self.progress.best_accuracy or 0.0):.2f}% in epoch {best_epoch}"
        screen.say(
            f"epoch {epoch}/{self._settings.epochs}: validation accuracy {100 * validation['accuracy']:.2f}% ({best})"
        )
        return True

    def _save(self) -> None:
        """Writes the state and the progress; where this state is on disk already, the progress alone."""
        if int(self.state.step) != self.step:
            raise RuntimeError(f"the state says step {int(self.state.step)} after {self.step} steps")
        with self._stopper.saving():
            length = first_does(self._sync)
            seconds = time.monotonic() - self._began
            self.progress = self.progress._replace(metrics_length=length, seconds=seconds)
            content = record.content(self._config, self._data_checksum, self.progress)
            if self._saved is not None and self._saved.step == self.step:
                self._saved = checkpoints.update(self._saved, content)
            else:
                self._saved = checkpoints.save(self._directory, self.step, self.state, content)
                self._saved_at = time.monotonic()
            upkeep.tidy(self._directory, keep=self._settings.keep_checkpoints, also=self.progress.best_step)

    def _sync(self) -> int:
        assert self._log is not None
        self._log.sync()
        storage.push(self._workdir)
        return self._log.length

    def _stop(self) -> bool:
        name = self._stopper.requested or "a signal to another process"
        _log.warning(
            "stopped by %s after step %d of %d; run the same command to go on", name, self.step, self._total
        )
        return True
