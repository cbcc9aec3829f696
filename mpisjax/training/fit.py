"""Trains from wherever a run stands to its end: the entry that takes a user's own step, batches and measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpisjax.training import processes, profiling, run_folder
from mpisjax.training.checkpoints import FOLDER
from mpisjax.training.loop import EvalFn, LoopSettings, OnEpoch, TrainingRun
from mpisjax.training.metrics import DivergenceMonitor
from mpisjax.training.preemption import Stopper, watch
from mpisjax.training.profiling import Meter, Tracer
from mpisjax.training.record import Origin
from mpisjax.training.run_folder import hold
from mpisjax.training.saving import Saver
from mpisjax.training.step_runner import Feed, StepRunner, TrainStep


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


def fit(
    settings: LoopSettings,
    workdir: str | Path,
    *,
    state: Any,
    train_step: TrainStep,
    feed: Feed,
    eval_fn: EvalFn | None = None,
    test_fn: EvalFn | None = None,
    origin: Origin | None = None,
    adjoint_tol: float | None = None,
    diagnose: Callable[[Any, int], str] | None = None,
    on_epoch: OnEpoch | None = None,
    on_end: Callable[[Path], None] | None = None,
    stopper: Stopper | None = None,
    meter: Meter | None = None,
    profile: bool = False,
) -> FitResult:
    """Trains to the end of the last epoch, from wherever the run in `workdir` stands.

    Args:
        settings: The numbers.
        workdir: The run's folder; made where it is missing.
        state: The state at step 0 (a pytree of arrays); where a checkpoint is restored, the template for it.
        train_step: Takes (state, batch), gives (state, metrics); it may be given the state's buffers for
            good. The metrics are a NamedTuple of scalars, with `loss`, `accuracy`, `learning_rate`, `finite`
            (0 or 1: the step changed the parameters) and `skipped` (steps in a row that did not) at least.
        feed: The batches.
        eval_fn: Measures a state on the validation split.
        test_fn: Measures a state on the test split. It is called once, after the last step, with the best
            state.
        origin: Identifies config and data; a run is not continued with others. Runs without one are taken for alike.
        adjoint_tol: The `adjoint_residual` up to which the adjoint solve counts as converged; None: no limit.
        diagnose: Takes (state, step) when training has diverged, and gives a clause for the message.
        on_epoch: Takes (state, metrics) after each validation: the measurements, with `epoch` and `step`. True ends the
            training cleanly: the state is saved, the test split is measured, and the same command trains no further.
            Every process calls it, and the first one's answer counts.
        on_end: Takes the folder of `metrics.jsonl` when the run is complete; the first process calls it.
        stopper: Who listens for signals; by default the loop itself does.
        meter: Says how much arithmetic the steps of an interval were.
        profile: Whether to trace a few steps into the folder.

    Returns:
        How the run ended.

    Raises:
        Preempted: A signal came before the folder was taken.
        UserError: The folder is in use or cannot be written, its checkpoints belong to another config or are
            all damaged, or the disk is full.
        DivergenceError: `max_skipped` steps in a row were not finite; the last good state has been saved.
    """
    with contextlib.ExitStack() as stack:
        stopper = stopper or stack.enter_context(watch())  # first: whoever sees the lock may send a signal
        stack.enter_context(stopper.deferred())
        path = stack.enter_context(hold(workdir))
        origin = origin or Origin({}, {}, "")
        saver = Saver(path / FOLDER, origin, settings.keep_checkpoints, settings.checkpoint_seconds)
        stack.enter_context(saver)
        traces = run_folder.local_of(path) / profiling.FOLDER if profile and processes.is_primary() else None
        restored, progress = saver.resume(state)
        run = TrainingRun(
            settings=settings,
            workdir=path,
            saver=saver,
            steps=StepRunner(train_step, feed, state),
            steps_per_epoch=feed.steps_per_epoch,
            stopper=stopper,
            monitor=DivergenceMonitor(settings.max_skipped, adjoint_tol),
            tracer=Tracer(traces),
            meter=meter,
            diagnose=diagnose,
            on_epoch=on_epoch,
            on_end=on_end,
            state=restored,
            progress=progress,
        )
        stack.callback(run.close)
        stopped = run.train(eval_fn) or run.finish(test_fn)
        best = run.progress
        return FitResult(
            run.state, run.step, best.best_step or run.step, best.best_accuracy, best.test, stopped
        )
