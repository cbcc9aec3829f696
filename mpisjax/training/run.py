"""A whole run from a config: data, network, devices and loop put together, and what is said about them first."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from mpisjax import configuration
from mpisjax.configuration import makers, rules
from mpisjax.cpu import library
from mpisjax.data import Batch, DataSet, Feed, prepare_images, summary
from mpisjax.errors import UserError
from mpisjax.firing import RateReading
from mpisjax.jacobian import spectral_radius
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.simulate import weighted_mean_frame
from mpisjax.storage import checkpoints, processes, record, run_folder
from mpisjax.storage.preemption import Stopper, watch
from mpisjax.storage.processes import run_on_primary
from mpisjax.storage.record import Origin
from mpisjax.storage.run_folder import hold
from mpisjax.training import devices, init_from
from mpisjax.training.chance import warn_at_chance
from mpisjax.training.evaluation import Evaluation, readout_name
from mpisjax.training.fit import FitResult, measured_on, train
from mpisjax.training.loop import LoopSettings, OnEpoch
from mpisjax.training.state import TrainState, evaluated_variables
from mpisjax.training.step_runner import Meter

LOG_NAME = "train.log"
FILE_ONLY = {"file_only": True}  # marks what a person at a screen need not read
SHOWN_SAMPLES = 32  # of a batch, to estimate the spectral radius when training has diverged
_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a config stands for.

    Attributes:
        dataset: The data.
        net: The network.
        mesh: The devices that share a training batch.
        feed: The training batches.
        state: The state before the first step, whole on every device of the mesh unless its axis "model" splits it.
    """

    dataset: DataSet
    net: MPIS
    mesh: jax.sharding.Mesh
    feed: Feed
    state: TrainState


def assemble(config: ml_collections.ConfigDict) -> Parts:
    """Loads the data and makes the network and its initial state.

    Raises:
        UserError: A setting cannot be, data are missing or damaged, or JAX finds no device of the kind asked for.
    """
    rules.check(config)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={asked!r}; install its plugin (for a GPU: pip install "
            "'jax[cuda12]') or unset JAX_PLATFORMS"
        ) from error
    dataset = makers.make_dataset(config)
    net = makers.make_network(config, dataset)
    mesh = makers.make_mesh(config, config.train.batch_size // config.train.accumulate)
    feed = Feed(dataset.train, config.train.batch_size, config.seed, devices.batch_sharding(mesh))

    def initial() -> TrainState:
        variables = makers.initial_variables(config, net, dataset)
        return makers.init_state(config, variables, feed.steps_per_epoch)

    place = devices.state_sharding(jax.eval_shape(initial), mesh)
    state = jax.jit(initial, out_shardings=place)()
    return Parts(dataset, net, mesh, feed, state)


def run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    stopper: Stopper | None = None,
    *,
    on_epoch: OnEpoch | None = None,
    on_end: Callable[[Path], None] | None = None,
    profile: bool = False,
) -> FitResult:
    """Trains as a config says, from wherever the run in `workdir` stands.

    Args:
        config: All settings.
        workdir: The run's folder; made where it is missing.
        stopper: Who listens for signals; by default the run itself does.
        on_epoch: See `mpisjax.training.fit.train`.
        on_end: See `mpisjax.training.fit.train`.
        profile: Whether to trace a few steps into the folder.

    Returns:
        How the run ended.

    Raises:
        Preempted: A signal came before training began.
        UserError: A setting cannot be, data are missing or damaged, the folder is in use or does not belong to this
            config, the disk is full, or training diverged.
    """
    rules.check(config)
    with contextlib.ExitStack() as stack:
        stopper = stopper or stack.enter_context(watch())  # first: whoever sees the lock may send a signal
        with stopper.deferred():
            path = stack.enter_context(hold(workdir))
        with stopper.interruptible():
            parts = assemble(config)
        settings = configuration.to_plain(config)
        processes.assert_equal_across_processes("config", json.dumps(settings))
        processes.assert_equal_across_processes("data set", parts.dataset.checksum)
        run_on_primary(lambda: run_folder.pull(path))
        if config.train.init_from and not run_on_primary(lambda: checkpoints.steps(path / checkpoints.FOLDER)):
            parts = parts._replace(state=init_from.started_from(config.train.init_from, parts.state))
        steps_per_epoch = parts.feed.steps_per_epoch
        solves = config.train.method == "implicit" and config.adjoint.solver != "phantom"
        train_step = makers.make_train_step(config, parts.net, parts.dataset, steps_per_epoch, parts.mesh)
        evaluator = makers.make_evaluator(config, parts.net, parts.dataset)

        # Whatever a config can have wrong has been found by now: from here on the folder is written.
        if processes.is_primary():
            first_log = run_folder.local_of(path) / LOG_NAME
            stack.callback(run_folder.push, path)
            stack.enter_context(_log_to(first_log))
        _introduce(config, parts)
        result = train(
            LoopSettings(**{name: config.train[name] for name in LoopSettings._fields}),
            path,
            state=parts.state,
            train_step=train_step,
            feed=parts.feed,
            eval_fn=measured_on(evaluator, parts.dataset.validation),
            test_fn=measured_on(evaluator, parts.dataset.test) if config.train.test_at_end else None,
            origin=Origin(settings, configuration.to_plain(configuration.base()), parts.dataset.checksum),
            adjoint_tol=config.adjoint.tol if solves else None,
            spikes_tol=config.forward.residual_tol if config.forward.mode == "spikes" else None,
            diagnose=(lambda state, step: _diagnose(config, parts, state, step)) if processes.count() == 1 else None,
            on_epoch=on_epoch,
            on_end=on_end,
            stopper=stopper,
            meter=_meter(config, parts, train_step),
            profile=profile,
        )
        if result.test is not None:
            test = result.test
            spikes = test.get("accuracy_spikes")
            _log.info(
                "test accuracy %.2f%% by the %s%s, of the state of epoch %d; see %s",
                100 * test["accuracy"],
                readout_name(makers.make_bptt(config)),
                f", {100 * spikes:.2f}% by spikes alone (T = {test['num_steps']:g})" if spikes is not None else "",
                result.best_step // steps_per_epoch,
                path,
            )
        elif not result.stopped:
            _log.info("the test split was not measured: train.test_at_end is False; see %s", path)
        if not result.stopped:
            warn_at_chance(path, parts.dataset)
        return result


def _meter(config: ml_collections.ConfigDict, parts: Parts, train_step: Any) -> Meter:
    size, shape = config.train.batch_size, parts.dataset.train.images.shape[1:]
    batch = jax.eval_shape(
        lambda: Batch(jnp.zeros((size, *shape), jnp.uint8), jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32))
    )
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), parts.state)
    loops = makers.counted_loops(config, parts.dataset.temporal)
    return Meter(train_step, (state, batch), parts.mesh, loops=loops, batch_size=size, dtype=config.model.dtype)


def _introduce(config: ml_collections.ConfigDict, parts: Parts) -> None:
    about = summary(parts.dataset)
    _log.info("data: %s: %s", about["name"], about["source"])
    _log.info("data checksum: %s", about["checksum"], extra=FILE_ONLY)
    for split, counts in about["class_counts"].items():
        counts = np.asarray(counts)
        _log.info("%s: %d examples, by class: %s", split, counts.sum(), " ".join(map(str, counts)))
    count = model.parameter_count({"params": parts.state.params})
    _log.info("network: %s parameters", f"{count:,}")
    used, shares = parts.mesh.devices.ravel(), parts.mesh.shape["data"]
    whose = "compiled for this processor" if library.enabled() and makers.served_on_cpu(config) else "of XLA"
    _log.info(
        "devices: %d x %s (%s), each taking %d of a batch of %d%s%s%s",
        len(used), used[0].platform, used[0].device_kind, config.train.batch_size // shares, config.train.batch_size,
        f", {len(used) // shares} sharing each layer's channels" if len(used) > shares else "",
        f", {processes.count()} processes" if processes.count() > 1 else "",
        f"; {library.threads()} threads, convolutions {whose}" if used[0].platform == "cpu" else "",
    )  # fmt: skip
    settings = json.dumps(flatten_dict(configuration.to_plain(config), sep="."))
    _log.info("config: %s", settings, extra=FILE_ONLY)


def _diagnose(config: ml_collections.ConfigDict, parts: Parts, state: TrainState, step: int) -> str:
    """The spectral radius of the equivalent map's Jacobian at the equilibrium of the last batch."""
    net, neuron = parts.net, makers.make_neuron(config)
    images = parts.feed.batch(step - 1).images[:SHOWN_SAMPLES]

    @jax.jit
    def radius(variables: Any, images: jax.Array) -> jax.Array:
        x = prepare_images(images, parts.dataset)
        rates = model.apply(
            net, variables, x, neuron=neuron, forward=makers.make_evaluation_solver(config)
        ).equilibrium.rates
        current = net.apply(variables, x, False, method="encode")
        current = weighted_mean_frame(current, neuron.leak) if net.temporal else current
        transition = model.transition_of(net)
        return spectral_radius(
            lambda r: transition(variables, r, current, RateReading(neuron)), rates, jax.random.key(0)
        ).value

    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    return f"spectral radius of the Jacobian {float(radius(variables, jax.device_get(images)).max()):.2f}"


class _QuietFileHandler(logging.FileHandler):
    """Goes on without the file when the disk is full, rather than print a traceback an entry."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing."""


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Copies the package's log to a file, as far as the disk takes it."""
    logger = logging.getLogger("mpisjax")
    try:
        handler = _QuietFileHandler(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name a --workdir you may write to") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def restore_best(workdir: str | Path, config: ml_collections.ConfigDict) -> tuple[Parts, TrainState, int]:
    """The best state of a run, and what its config stands for.

    Args:
        workdir: The run's folder.
        config: The run's config (see `saved_config`), perhaps with other settings of evaluation.

    Returns:
        The parts, the state, and the step it was saved at.

    Raises:
        UserError: There is no sound checkpoint, or it does not fit the config.
    """
    chosen = record.best(workdir)
    parts = assemble(config)
    return parts, checkpoints.restore(chosen, parts.state), chosen.step


def saved_config(workdir: str | Path, trusted: bool | Collection[str] = False) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`, from its best checkpoint.

    Args:
        workdir: The run's folder.
        trusted: See `mpisjax.configuration.check_trusted`.

    Raises:
        UserError: There is no sound checkpoint, or it names a function that is not trusted.
    """
    return init_from.config_of(record.best(workdir), trusted)


def evaluate_at(
    config: ml_collections.ConfigDict, parts: Parts, state: TrainState, split: Any, num_steps: int | None
) -> Evaluation:
    """Measures a state on a split with `num_steps` time steps (None: as configured)."""
    evaluator = makers.make_evaluator(config, parts.net, parts.dataset, num_steps)
    return evaluator(evaluated_variables(state), split)
