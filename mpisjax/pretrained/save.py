"""A run's network, to be used or given away: its weights, and a card that says how they were made."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mpisjax import configuration, weights
from mpisjax.configuration import makers
from mpisjax.data import DataSet
from mpisjax.errors import UserError
from mpisjax.nn import as_module
from mpisjax.paths import expand
from mpisjax.pretrained.familiar import measure
from mpisjax.pretrained.files import write
from mpisjax.pretrained.inputs import Inputs, from_json, without_examples
from mpisjax.pretrained.trained import Trained, from_variables
from mpisjax.storage import checkpoints, record
from mpisjax.storage.run_folder import path_of
from mpisjax.training import init_from
from mpisjax.training.state import initial_variables

MAX_BYTES = 2_000_000  # of the weights of a network that comes with the package
INPUTS_NAME = "inputs.json"  # in a run's folder


def inputs_of(dataset: DataSet) -> Inputs:
    """What a network trained on a data set reads; classes without names are "class 0" and so on."""
    return Inputs(
        name=dataset.name,
        num_classes=dataset.num_classes,
        classes=dataset.classes or unnamed(dataset.num_classes),
        shape=tuple(int(n) for n in dataset.train.images.shape[1:]),
        mean=tuple(float(m) for m in dataset.mean),
        std=tuple(float(s) for s in dataset.std),
        temporal=dataset.temporal,
        steps_per_frame=dataset.steps_per_frame,
    )


def unnamed(number: int) -> tuple[str, ...]:
    """Names for so many classes that have none."""
    return tuple(f"class {n}" for n in range(number))


def from_run(
    workdir: str | Path, data_dir: str | Path | None = None, network: Any = None, trusted: bool = False
) -> Trained:
    """The best state of a run as `load_pretrained` would give it; its card lacks what only a file has.

    What the network reads, and what its training data look like to it, is kept in the run's folder as `inputs.json`:
    the data are loaded the first time alone.

    Args:
        workdir: The run's folder.
        data_dir: The folder with the original files, if they have moved.
        network: The network; None: what the settings say.
        trusted: Whether to import the module of a network that only the stored settings name.

    Raises:
        UserError: There is no sound checkpoint, or the data are missing or not those of the run.
    """
    path = path_of(workdir)
    best = record.best(path)
    fitted = best.content.get("about") if network is not None else None  # what `mpisjax.fit` has kept
    if fitted is not None:
        config = _settings_of(fitted, path)
    else:
        config = init_from.config_of(best, trusted or network is not None)
    if data_dir is not None:
        config.data.dir = expand(data_dir)
    checksum = best.content["data_checksum"]
    about, dataset = fitted or _known(path, checksum), None
    if about is None:
        dataset = _data(path, config, checksum)
        source = dataset.source.replace(config.data.dir, "DIR") if config.data.dir else dataset.source
        about = {"inputs": inputs_of(dataset)._asdict(), "num_train": len(dataset.train.labels), "source": source}
    inputs = from_json(about["inputs"])
    inputs = inputs._replace(classes=inputs.classes or unnamed(inputs.num_classes))
    net = makers.make_network(config, without_examples(inputs)) if network is None else as_module(network)
    variables, step = init_from.best_variables(path, _shapes(config, net, inputs))
    if fitted is None and about.get("step") != step:
        # The state is another than that which was looked at.
        dataset = dataset or _data(path, config, checksum)
        seen = measure(net, variables, inputs, makers.make_neuron(config), dataset.train, dataset.validation)
        about = {**about, "step": step, "familiar": seen.to_card()}
        with contextlib.suppress(OSError):  # a folder that cannot be written is read as well
            (path / INPUTS_NAME).write_text(json.dumps({**about, "data_checksum": checksum}, indent=1) + "\n")
    newest: Any = checkpoints.newest(path / checkpoints.FOLDER)
    progress = record.progress_of(newest)  # the newest checkpoint knows how the run ended
    card = {
        "config": configuration.to_plain(config),
        "inputs": inputs._asdict(),
        "training": {
            "seed": config.seed,
            "epochs": config.train.epochs,
            "best_epoch": step // (about["num_train"] // config.train.batch_size),
            "steps": step,
            "seconds": round(progress.seconds),
            "environment": best.content["environment"],
        },
        "data": {"source": about["source"], "checksum": checksum},
        "validation": None if progress.best_accuracy is None else {"accuracy": progress.best_accuracy},
        "test": progress.test,
        "familiar": about.get("familiar"),
    }
    return from_variables(path.name, config, inputs, variables, card, net)


def _shapes(config: ml_collections.ConfigDict, net: Any, inputs: Inputs) -> Any:
    """Shapes of a network's variables, on one device."""
    place, neuron = jax.sharding.SingleDeviceSharding(jax.devices()[0]), makers.make_neuron(config)
    shapes = jax.eval_shape(lambda: initial_variables(net, 0, inputs.shape, neuron))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def _settings_of(about: dict[str, Any], path: Path) -> ml_collections.ConfigDict:
    """What a run of `mpisjax.fit` has kept as settings; they name no network."""
    if about["neuron"] is None:
        raise UserError(f"{path} was trained with neurons that are no LIF of one threshold: give them in the network")
    config = configuration.base()
    config.name, config.seed, config.model.name = path.name, about["seed"], ""
    config.data.name, config.data.steps_per_frame = about["inputs"]["name"], about["inputs"]["steps_per_frame"]
    config.train.batch_size, config.train.epochs = about["batch_size"], about["epochs"]
    config.neuron.update(about["neuron"])
    config.forward.settle_tol = about["forward"]["settle_tol"]
    config.forward.num_steps = about["forward"]["num_steps"] or config.forward.num_steps
    if about["bptt"] is not None:
        config.train.method = "bptt"
        config.bptt.update({key: tuple(v) if isinstance(v, list) else v for key, v in about["bptt"].items()})
    return config


def _known(path: Path, checksum: str) -> dict[str, Any] | None:
    """What an earlier `from_run` kept in a run's folder, if it is of these data."""
    try:
        known = json.loads((path / INPUTS_NAME).read_text())
        fits = known["data_checksum"] == checksum and {"inputs", "num_train", "source"} <= known.keys()
        return known if fits else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _data(path: Path, config: ml_collections.ConfigDict, checksum: str) -> DataSet:
    dataset = makers.make_dataset(config)
    if dataset.checksum != checksum:
        raise UserError(f"{path} was trained on other data than {config.data.name} here; set config.data.dir")
    return dataset


def save(trained: Trained, path: str | Path, training: dict[str, str], note: str = "") -> Path:
    """Writes a run's network as one that can come with the package; a file that exists is left as it is.

    Args:
        trained: What `from_run` gave.
        path: See `write`.
        training: The command, the commit of the code, the machine in words and the date, YYYY-MM-DD.
        note: Anything else worth knowing.

    Returns:
        The path of the weights; the card lies beside it.

    Raises:
        UserError: The name is taken, the weights are larger than `MAX_BYTES`, or the folder cannot be written.
    """
    if len(weights.to_bytes(trained.variables)) > MAX_BYTES:
        raise UserError(
            f"the weights of {trained.name} take more than the {MAX_BYTES:,} bytes that a network of the package may "
            "have; give the run's folder away instead, or what mpisjax.load(FOLDER).save(PATH) writes"
        )
    card = {**trained.card, "training": {**trained.card["training"], **training}}
    return write(trained.variables, card, path, note)
