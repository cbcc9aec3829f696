"""Trained networks, ready to use: those that come with the package, and those of your own runs.

`load_pretrained("digits")` and `load("runs/digits")` give the same object, `Trained`: the network, its weights, its
settings, its card, and `predict`. `python -m mpisjax.pretrained` makes a network to give away from a run's folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from mpisjax.errors import UserError
from mpisjax.paths import expand
from mpisjax.pretrained.inputs import Inputs, as_pixels, from_json
from mpisjax.pretrained.trained import Trained, from_variables

if TYPE_CHECKING:
    import ml_collections

    from mpisjax.training.run import Parts
    from mpisjax.training.state import TrainState

__all__ = ["Inputs", "Trained", "as_pixels", "available", "load", "load_pretrained", "restore", "saved_at"]
_log = logging.getLogger(__name__)


def available() -> list[str]:
    """The names of the networks that come with the package."""
    from mpisjax import weights

    return weights.available()


def load_pretrained(
    name: str, folder: str | Path | None = None, *, network: Any = None, trust: bool = False
) -> Trained:
    """Loads a trained network that comes with the package.

    Args:
        name: One of `mpisjax.pretrained.available()`.
        folder: Where its two files are; None: in the package.
        network: See `load`.
        trust: See `load`.

    Returns:
        The network, its arrays on the default device.

    Raises:
        UserError: There is no such network, or its files are damaged.
    """
    from mpisjax import configuration, weights
    from mpisjax.configuration import rules

    variables, card = weights.read(name, weights.FOLDER if folder is None else Path(expand(folder)))
    config = configuration.with_defaults(configuration.from_plain(card["config"]))
    rules.check_trusted(config, f"the card of {name}", trust or network is not None)
    return from_variables(name, config, from_json(card["inputs"]), variables, card, network)


def load(path: str | Path, data_dir: str | Path | None = None, *, network: Any = None, trust: bool = False) -> Trained:
    """Loads a network of your own.

    Args:
        path: A run's folder, whose best state is taken, or what `Trained.save` was given.
        data_dir: For a run: the folder with the original files, if they have moved. Older runs need the data, because
            normalisation was measured on them.
        network: The network itself, an `mpisjax.nn.Network` or a linen module as `mpisjax.fit` takes it. Runs of
            `mpisjax.fit` need it, since no settings say what their network is. None: as the stored settings say.
        trust: Whether to import the module of a network of one's own that the stored settings name. Its code runs:
            do so only where you trust whoever wrote the file.

    Returns:
        The network, its arrays on the default device.

    Raises:
        UserError: There is neither a run nor a network, it is damaged, its data are missing, or it names a module that
            is not trusted.
    """
    from mpisjax.pretrained.save import from_run

    name = expand(path)
    if (file := saved_at(name)) is not None:
        return load_pretrained(file.stem, file.parent, network=network, trust=trust)
    if "://" not in name and not Path(name).exists():
        hint = f"; mpisjax.load_pretrained({name!r}) is in the package" if name in available() else ""
        raise UserError(f"there is no run and no network {name}{hint}")
    return from_run(name, data_dir=data_dir, network=network, trusted=trust)


def saved_at(path: str) -> Path | None:
    """The weights file that `Trained.save(path)` wrote; None where there is none."""
    file = Path(path if path.endswith(".safetensors") else f"{path}.safetensors")
    return file if "://" not in path and file.is_file() else None


def restore(found: Trained, config: ml_collections.ConfigDict) -> tuple[Parts, TrainState, int]:
    """A saved network in the place of a run's best state, as `mpisjax.training.run.restore_best` gives it.

    Args:
        found: The network.
        config: Its config, perhaps with other settings of data and evaluation.

    Returns:
        The parts that the config stands for, the state with the network's weights, and the step they are
        from.

    Raises:
        UserError: The data are missing or of another kind.
    """
    from mpisjax import weights
    from mpisjax.training.run import assemble

    parts = assemble(config)
    state = parts.state
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    weights.check_fit(found.variables, ours, f"network {found.name!r}")
    if parts.dataset.checksum != found.card["data"]["checksum"]:
        _log.warning("the data here are not those that the card of %r was made with: figures may differ", found.name)
    variables = jax.device_put(found.variables, jax.tree.leaves(state.params)[0].sharding)
    state = state._replace(params=variables["params"], batch_stats=variables["batch_stats"], ema=())
    return parts, state, int(found.card["training"]["steps"])
