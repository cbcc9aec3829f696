"""A pretrained network in the place of a run's best state, for `evaluate.py`."""

from __future__ import annotations

import logging

import jax
import ml_collections

from mpisjax.pretrained import load_pretrained
from mpisjax.training.run import Parts, assemble
from mpisjax.training.start import check_fits
from mpisjax.training.state import TrainState

_log = logging.getLogger(__name__)


def restore(name: str, config: ml_collections.ConfigDict) -> tuple[Parts, TrainState, int]:
    """What `mpisjax.training.run.restore_best` gives of a run: parts, state, and the step of the weights.

    Args:
        name: Of the pretrained network.
        config: Its config, perhaps with other settings of data and evaluation.

    Raises:
        UserError: There is no such network, it is damaged, or the data are missing or of another kind.
    """
    found, parts = load_pretrained(name), assemble(config)
    check_fits(
        found.variables,
        {"params": parts.state.params, "batch_stats": parts.state.batch_stats},
        f"pretrained network {name!r}",
    )
    if parts.dataset.checksum != found.card["data"]["checksum"]:
        _log.warning(
            "the data here are not those that the card of %r was made with: figures may differ", name
        )
    variables = jax.device_put(found.variables, jax.tree.leaves(parts.state.params)[0].sharding)
    state = parts.state._replace(params=variables["params"], batch_stats=variables["batch_stats"], ema=())
    return parts, state, int(found.card["training"]["steps"])
