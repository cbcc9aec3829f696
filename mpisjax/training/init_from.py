"""Weights for a run to start from: another run's best state, averages included, under a fresh optimiser."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mpisjax import configuration, weights
from mpisjax.configuration import rules
from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, record
from mpisjax.storage.checkpoints import Checkpoint
from mpisjax.storage.run_folder import path_of
from mpisjax.training.state import TrainState

Variables = dict[str, Any]
_log = logging.getLogger(__name__)


def config_of(checkpoint: Checkpoint, trusted: bool | Collection[str] = False) -> ml_collections.ConfigDict:
    """The settings that a checkpoint was written with.

    Args:
        checkpoint: The checkpoint.
        trusted: See `mpisjax.configuration.check_trusted`.

    Raises:
        UserError: `mpisjax.fit` wrote it, whose objects no settings describe, or it names a function that is not
            trusted.
    """
    stored = checkpoint.content["config"]
    if "fit" in stored:
        run = checkpoint.path.parent.parent
        how = f"load it in Python, with mpisjax.load({str(run)!r}, network=...)"
        if "about" not in checkpoint.content:  # an older version wrote it
            how = "call mpisjax.fit again with the same objects, which gives its best weights"
        raise UserError(f"{run} was trained by mpisjax.fit, so no settings say what its network is: {how}")
    config = configuration.with_defaults(configuration.from_plain(stored))
    rules.check_trusted(config, str(checkpoint.path.parent.parent), trusted)
    return config


def started_from(name: str, state: TrainState) -> TrainState:
    """A first state with the weights and running statistics of another run's best state.

    Args:
        name: The other run's folder, or a pretrained network.
        state: The state to put them into, at step 0.

    Returns:
        The state, the averages (where they are kept) started from the same weights.

    Raises:
        UserError: The folder holds no sound checkpoint, or its network is another.
    """
    template = {"params": state.params, "batch_stats": state.batch_stats}
    if name in weights.available() and not Path(name).exists():
        found, _ = weights.read(name)
        origin = f"the pretrained network {name!r}"
        weights.check_fit(found, template, origin)
        found = jax.device_put(found, jax.tree.map(lambda leaf: leaf.sharding, template))
    else:
        found, step = best_variables(path_of(name), template)
        origin = f"{name}, step {step}"
    _log.info("weights from %s", origin)
    # Copies each, since a training step is given its state's buffers for good.
    averages = () if state.ema == () else jax.tree.map(jnp.copy, found)
    return state._replace(params=found["params"], batch_stats=found["batch_stats"], ema=averages)


def best_variables(workdir: Path, template: Variables) -> tuple[Variables, int]:
    """The weights and running statistics that evaluation takes of a run, and the step they were saved at.

    Args:
        workdir: The run's folder.
        template: `{"params": ..., "batch_stats": ...}` of the network: arrays, or shapes with shardings.

    Raises:
        UserError: There is no sound checkpoint, or the network is another.
    """
    chosen = record.best(workdir)
    return checkpoints.restore_variables(chosen, template, f"{workdir}, step {chosen.step}"), chosen.step
