"""Weights for a run to start from: another run's best state, averages included, under a fresh optimiser."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mpisjax import configuration, weights
from mpisjax.configuration import makers
from mpisjax.data import DataSet
from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, record
from mpisjax.storage.checkpoints import Checkpoint
from mpisjax.storage.run_folder import path_of
from mpisjax.training.state import TrainState, evaluated_variables

Variables = dict[str, Any]
_log = logging.getLogger(__name__)


def config_of(checkpoint: Checkpoint) -> ml_collections.ConfigDict:
    """The settings that a checkpoint was written with.

    Raises:
        UserError: `mpisjax.fit` wrote it, whose objects no settings describe.
    """
    stored = checkpoint.content["config"]
    if "fit" in stored:
        run = checkpoint.path.parent.parent
        raise UserError(
            f"{run} was trained by mpisjax.fit, so no settings say what its network is; call mpisjax.fit again with "
            "the same objects, which gives its best weights"
        )
    return configuration.with_defaults(configuration.from_plain(stored))


def abstract_state(config: ml_collections.ConfigDict, dataset: DataSet, place: Any) -> TrainState:
    """Shapes, dtypes and placement of a config's training state.

    Args:
        config: All settings.
        dataset: What the network reads.
        place: The sharding of every array.
    """
    net = makers.make_network(config, dataset)

    def initial() -> TrainState:
        variables = makers.initial_variables(config, net, dataset)
        return makers.init_state(config, variables, 1)  # the schedule's length changes no shape

    state = jax.eval_shape(initial)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state)


def started_from(config: ml_collections.ConfigDict, dataset: DataSet, state: TrainState) -> TrainState:
    """A first state with the weights and running statistics of another run's best state.

    Args:
        config: All settings; `train.init_from` names the other run's folder, or a pretrained network.
        dataset: What the network reads.
        state: The state to put them into, at step 0.

    Returns:
        The state, the averages (where they are kept) started from the same weights.

    Raises:
        UserError: The folder holds no sound checkpoint, or its network is another.
    """
    found, origin = _find(config.train.init_from, dataset, jax.tree.leaves(state.params)[0].sharding)
    weights.check_fit(found, {"params": state.params, "batch_stats": state.batch_stats}, origin)
    _log.info("weights from %s", origin)
    # Copies each, since a training step is given its state's buffers for good.
    averages = jax.tree.map(jnp.copy, found) if config.train.ema else ()
    return state._replace(params=found["params"], batch_stats=found["batch_stats"], ema=averages)


def best_variables(workdir: Path, dataset: DataSet, place: Any) -> tuple[Variables, int]:
    """The weights and running statistics that evaluation takes of a run, and the step they were saved at.

    Args:
        workdir: The run's folder.
        dataset: What its network reads.
        place: Where to put the arrays (a sharding).

    Raises:
        UserError: There is no sound checkpoint.
    """
    chosen = record.best(workdir)
    config = config_of(chosen)
    state = checkpoints.restore(chosen, abstract_state(config, dataset, place))
    return evaluated_variables(state), chosen.step


def _find(name: str, dataset: DataSet, place: Any) -> tuple[Variables, str]:
    if name in weights.available() and not Path(name).exists():
        variables, _ = weights.read(name)
        return jax.device_put(variables, place), f"the pretrained network {name!r}"
    variables, step = best_variables(path_of(name), dataset, place)
    return variables, f"{name}, step {step}"
