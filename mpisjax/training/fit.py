"""Trains a network from Python, by the loop that the command line has: it resumes, validates, saves and stops in good
order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Augmentation, DataSet, Feed
from mpisjax.errors import UserError
from mpisjax.neurons import LIF
from mpisjax.nn import MPIS, Network, as_module
from mpisjax.nn.network import Variables
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import Adjoint, RateForward
from mpisjax.storage import checkpoints, processes, record, run_folder
from mpisjax.storage.preemption import Stopper, watch
from mpisjax.storage.record import Origin
from mpisjax.storage.run_folder import hold
from mpisjax.storage.saving import Saver
from mpisjax.training import devices, step_runner
from mpisjax.training.chance import warn_at_chance
from mpisjax.training.evaluation import make_evaluator
from mpisjax.training.loop import EvalFn, LoopSettings, OnEpoch, TrainingRun
from mpisjax.training.loss import class_weights_of
from mpisjax.training.metrics import DivergenceMonitor
from mpisjax.training.state import cosine, evaluated_variables, init_state, initial_variables, sgd
from mpisjax.training.step import make_train_step
from mpisjax.training.step_runner import Meter, StepRunner, Tracer, TrainStep

MOST_TEXT = 5000  # an object's text is longer where it holds its weights, as that of an NNX module


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
    network: MPIS | nn.Module | Network,
    dataset: DataSet,
    *,
    workdir: str | Path,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    neuron: LIF = LIF(),  # noqa: B008 (a constant)
    forward: SpikeForward | RateForward = SpikeForward(),  # noqa: B008
    adjoint: Adjoint | None = None,
    bptt: BPTT | None = None,
    returns: str = "equivalent",
    eval_forward: SpikeForward | RateForward | None = None,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation] | None = None,
    augmentation: Augmentation = Augmentation(),  # noqa: B008
    mixup: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | str = "",
    jacobian_weight: float = 0.0,
    rate_weight: float = 0.0,
    averaging: float = 0.0,
    accumulate: int = 1,
    variables: Variables | None = None,
    patience: int = 0,
    on_epoch: OnEpoch | None = None,
    on_end: Callable[[Path], None] | None = None,
    eval_batch_size: int = 256,
    **how_to_save: float,
) -> tuple[Variables, FitResult]:
    """Trains a network, from wherever the run in `workdir` stands, and measures its best state on the test split.

    The same call goes on after an interruption, bit for bit; with more `epochs` it goes on with a run that is complete.

    Args:
        network: An `mpisjax.nn.MPIS`, or one's own (see `mpisjax.nn.Network`).
        dataset: What `mpisjax.data` gives.
        workdir: The run's folder; made where it is missing.
        epochs: Passes over the train split.
        batch_size: Examples a step.
        seed: Of weights, order, augmentation and dropout.
        neuron: Of the populations that bring none.
        forward: How training finds the equilibrium.
        adjoint: How the backward pass is solved; None: as `mpisjax.equilibrium_forward` does by default.
        bptt: Differentiate the simulation through time instead (`mpisjax.baselines.bptt.BPTT`).
        returns: What the classifier sees in training: "equivalent" or "spikes"; see `mpisjax.equilibrium_forward`.
        eval_forward: How splits are measured. None: by `forward` where that simulates spikes, else by 30 steps of
            spikes.
        optimizer: An optax transformation, or a function that gives one for a number of training steps. None: SGD with
            Nesterov momentum, its learning rate falling from 0.1 by a cosine.
        augmentation: How images are changed.
        mixup: Parameter of the beta distribution that mixes two images; 0: none.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class in the loss; "balanced": the inverse of its share in the train split.
        jacobian_weight: Weight of ||J||_F^2 / n of the equivalent map in the loss.
        rate_weight: Weight of the mean firing rate in the loss.
        averaging: Decay of averaged weights, which evaluation then uses; 0: none.
        accumulate: Parts of a batch that are passed one by one.
        variables: The weights to begin with; None: random ones.
        patience: Epochs without a better validation after which training ends; 0: it goes on to the last one.
        on_epoch: Takes (state, metrics) after each epoch: the measurements of the validation split, with `epoch` and
            `step`. Training ends well where it returns True or raises `mpisjax.StopTraining`.
        on_end: Takes the folder of `metrics.jsonl` when the run is complete.
        eval_batch_size: Examples at once in evaluation.
        **how_to_save: Other fields of `mpisjax.training.loop.LoopSettings`: `log_every`, `keep_checkpoints` and so on.

    Returns:
        The variables of the best state, and how the run ended.

    Raises:
        UserError: The network lacks a method or gives other logits than the data set has classes, the folder belongs to
            another run, or training diverged.
    """
    module = as_module(network)
    mesh = devices.data_mesh(batch_size // accumulate)
    feed = Feed(dataset.train, batch_size, seed, devices.batch_sharding(mesh))
    steps, schedule = epochs * feed.steps_per_epoch, None
    if optimizer is None:
        schedule = cosine(0.1, steps, warmup_steps=min(feed.steps_per_epoch, steps // 10))
        optimizer = sgd(schedule)
    elif not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optimizer(steps)
    make_updates: optax.GradientTransformation = optimizer

    def initial() -> Any:
        made = variables
        if made is None:
            made = initial_variables(module, seed, dataset.train.images.shape[1:], neuron)
        return init_state(made, make_updates, seed=seed, averaging=bool(averaging))

    shapes = jax.eval_shape(initial)
    check_logits(module, shapes, dataset)
    state = jax.jit(initial, out_shardings=devices.state_sharding(shapes, mesh))()
    if eval_forward is None:
        eval_forward = forward if isinstance(forward, SpikeForward) else SpikeForward()
    evaluator = make_evaluator(
        module, dataset, neuron=neuron, forward=eval_forward, bptt=bptt, batch_size=eval_batch_size
    )
    recipe = {
        "neuron": neuron, "forward": forward, "adjoint": adjoint, "bptt": bptt, "returns": returns,
        "augmentation": augmentation, "mixup": mixup, "label_smoothing": label_smoothing, "averaging": averaging,
        "jacobian_weight": jacobian_weight, "rate_weight": rate_weight, "accumulate": accumulate,
    }  # fmt: skip
    kept = {
        "network": named(network),
        **{key: part if isinstance(part, int | float | str) else named(part) for key, part in recipe.items()},
        "class_weights": str(class_weights),
        "seed": seed,
        "batch_size": batch_size,
    }
    result = train(
        LoopSettings(epochs, batch_size, patience=patience, **how_to_save),  # type: ignore[arg-type]
        workdir,
        state=state,
        train_step=make_train_step(
            module,
            make_updates,
            inputs=dataset,
            schedule=schedule,
            class_weights=class_weights_of(class_weights, dataset),
            mesh=mesh,
            **recipe,  # type: ignore[arg-type]
        ),
        feed=feed,
        eval_fn=measured_on(evaluator, dataset.validation),
        test_fn=measured_on(evaluator, dataset.test),
        origin=Origin(
            {"fit": kept, "train": {"epochs": epochs}},
            {},
            dataset.checksum,
            {**about(dataset, neuron, eval_forward, bptt), "seed": seed, "batch_size": batch_size, "epochs": epochs},
        ),
        spikes_tol=getattr(forward, "residual_tol", None),
        on_epoch=on_epoch,
        on_end=on_end,
    )
    if not result.stopped:
        warn_at_chance(run_folder.path_of(workdir), dataset)
    best = result.state
    if result.best_step != result.step:
        best = checkpoints.restore(record.best(workdir), result.state)
    return evaluated_variables(best), result


def check_logits(module: Any, state: Any, dataset: DataSet) -> None:
    """Refuses a network whose logits are not one for each class.

    Args:
        module: The network.
        state: Shapes of its training state.
        dataset: The data.
    """
    shape = (1, *dataset.train.images.shape[1:])
    images = jax.ShapeDtypeStruct((shape[1], 1, *shape[2:]) if module.temporal else shape, jnp.float32)

    def classify(variables: Any, images: Any) -> Any:
        rates = module.initial_rates(images)
        return module.apply(variables, rates, False, method="classify")

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.eval_shape(classify, variables, images)
    if logits.shape != (1, dataset.num_classes):
        raise UserError(
            f"classify gives logits of shape {list(logits.shape)} for one image of {dataset.name}, which has "
            f"{dataset.num_classes} classes: make them [batch, {dataset.num_classes}]"
        )


def measured_on(evaluator: Callable[..., Any], split: Any) -> EvalFn | None:
    """What measures a training state on a split; None where the split is empty."""
    if not len(split.labels):
        return None
    return lambda state: evaluator(evaluated_variables(state), split)


def about(dataset: DataSet, neuron: LIF, forward: Any, bptt: BPTT | None) -> dict[str, Any]:
    """What `mpisjax.load` needs of a run beside its network, as JSON: what it reads, its neurons, how it answers."""
    reads = ("name", "num_classes", "classes", "temporal", "steps_per_frame")
    spikes = forward if isinstance(forward, SpikeForward) else SpikeForward()
    plain = isinstance(neuron, LIF) and np.ndim(neuron.threshold) == 0
    return {
        "inputs": {
            **{name: getattr(dataset, name) for name in reads},
            **{name: [*map(float, getattr(dataset, name))] for name in ("mean", "std")},
            "shape": [*map(int, dataset.train.images.shape[1:])],
        },
        "num_train": len(dataset.train.labels),
        "source": dataset.source,
        "neuron": {key: float(value) for key, value in dataclasses.asdict(neuron).items()} if plain else None,
        "forward": {"num_steps": spikes.num_steps, "settle_tol": spikes.tol or 0.0},
        "bptt": None if bptt is None else dataclasses.asdict(bptt),
    }


def named(part: Any) -> str:
    """What a run notes of an object that it is made of: its text, or its type where the text names a place in
    memory.
    """
    text = repr(part)
    return f"{type(part).__module__}.{type(part).__qualname__}" if " at 0x" in text or len(text) > MOST_TEXT else text


def train(
    settings: LoopSettings,
    workdir: str | Path,
    *,
    state: Any,
    train_step: TrainStep,
    feed: Any,
    eval_fn: EvalFn | None = None,
    test_fn: EvalFn | None = None,
    origin: Origin | None = None,
    adjoint_tol: float | None = None,
    spikes_tol: float | None = None,
    diagnose: Callable[[Any, int], str] | None = None,
    on_epoch: OnEpoch | None = None,
    on_end: Callable[[Path], None] | None = None,
    stopper: Stopper | None = None,
    meter: Meter | None = None,
    profile: bool = False,
) -> FitResult:
    """Trains to the end of the last epoch with any step, batches and measurements, from wherever the run stands.

    Args:
        settings: The numbers.
        workdir: The run's folder; made where it is missing.
        state: The state at step 0 (a pytree of arrays); where a checkpoint is restored, the template for it.
        train_step: Takes (state, batch), gives (state, metrics); it may be given the state's buffers for
            good. The metrics are a NamedTuple of scalars, with `loss`, `accuracy`, `learning_rate`, `finite`
            (0 or 1: the step changed the parameters) and `skipped` (steps in a row that did not) at least.
        feed: The batches: a `mpisjax.data.Feed`, or what has its `steps_per_epoch` and `batch`.
        eval_fn: Measures a state on the validation split.
        test_fn: Measures a state on the test split. It is called once, after the last step, with the best
            state.
        origin: Identifies config and data; a run is not continued with others. Runs without one are taken for alike.
        adjoint_tol: The `adjoint_residual` up to which the adjoint solve counts as converged; None: no limit.
        spikes_tol: The `forward_residual` up to which a simulation counts as converged; None: rates are solved.
        diagnose: Takes (state, step) when training has diverged, and gives a clause for the message.
        on_epoch: Takes (state, metrics) after each epoch: the validation's measurements where there are any, with
            `epoch` and `step`. Where it returns True or raises `StopTraining`, training ends cleanly: the state is
            saved, the test split is measured, and the same command trains no further. Every process calls it, and the
            first one's answer counts.
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
    if settings.patience and eval_fn is None:
        raise UserError(
            f"train.patience is {settings.patience}, but no examples are held out: set data.num_validation above 0"
        )
    with contextlib.ExitStack() as stack:
        stopper = stopper or stack.enter_context(watch())  # first: whoever sees the lock may send a signal
        stack.enter_context(stopper.deferred())
        path = stack.enter_context(hold(workdir))
        origin = origin or Origin({}, {}, "")
        saver = Saver(path / checkpoints.FOLDER, origin, settings.keep_checkpoints, settings.checkpoint_seconds)
        stack.enter_context(saver)
        traces = run_folder.local_of(path) / step_runner.PROFILE_FOLDER if profile and processes.is_primary() else None
        restored, progress = saver.resume(state, feed.steps_per_epoch)
        run = TrainingRun(
            settings=settings,
            workdir=path,
            saver=saver,
            steps=StepRunner(train_step, feed, state),
            steps_per_epoch=feed.steps_per_epoch,
            stopper=stopper,
            monitor=DivergenceMonitor(settings.max_skipped, adjoint_tol, spikes_tol),
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
        return FitResult(run.state, run.step, best.best_step or run.step, best.best_accuracy, best.test, stopped)
