"""Writes a run's network to be given away: its weights, and a card that says how they were made."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mpisjax import configuration, weights
from mpisjax.data import DataSet, load
from mpisjax.data.recordings import CIFAR10_CLASSES
from mpisjax.errors import UserError
from mpisjax.pretrained import Inputs, Pretrained, from_variables
from mpisjax.training import checkpoints, init_from, record
from mpisjax.training.atomic import write_atomically

MAX_BYTES = 2_000_000  # of a weights file
DIGITS = tuple("0123456789")
CLASSES = {
    **dict.fromkeys(("digits", "mnist", "nmnist", "saccade_digits"), DIGITS),
    "cifar10": CIFAR10_CLASSES,
    "fashion_mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
        "ankle boot",
    ),
}  # fmt: skip


def inputs_of(dataset: DataSet) -> Inputs:
    """What a network trained on a data set reads; classes without names are "class 0" and so on."""
    unnamed = tuple(f"class {number}" for number in range(dataset.num_classes))
    return Inputs(
        name=dataset.name,
        num_classes=dataset.num_classes,
        classes=CLASSES.get(dataset.name, unnamed),
        shape=tuple(int(n) for n in dataset.train.images.shape[1:]),
        mean=tuple(float(m) for m in dataset.mean),
        std=tuple(float(s) for s in dataset.std),
        temporal=dataset.temporal,
    )


def from_run(workdir: str | Path, config: ml_collections.ConfigDict | None = None) -> Pretrained:
    """The best state of a run as `load_pretrained` would give it; its card lacks what only a file has.

    Args:
        workdir: The run's folder.
        config: The run's config, perhaps with another `data.dir`; None: as stored with the checkpoint. The
            data are loaded, because normalisation is measured on them.

    Raises:
        UserError: There is no sound checkpoint, or the data are missing or not those of the run.
    """
    workdir = Path(workdir)
    best = record.best(workdir)
    if config is None:
        config = configuration.with_defaults(configuration.from_plain(best.content["config"]))
    dataset = load(config.data)
    if dataset.checksum != best.content["data_checksum"]:
        raise UserError(
            f"{workdir} was trained on other data than {config.data.name} here; set config.data.dir"
        )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variables, step = init_from.best_variables(workdir, dataset, place)
    inputs = inputs_of(dataset)
    newest: Any = checkpoints.newest(workdir / checkpoints.FOLDER)
    progress = record.progress_of(newest)  # the newest checkpoint knows how the run ended
    source = dataset.source.replace(config.data.dir, "DIR") if config.data.dir else dataset.source
    card = {
        "config": configuration.to_plain(config),
        "inputs": inputs._asdict(),
        "training": {
            "seed": config.seed,
            "epochs": config.train.epochs,
            "best_epoch": step // (len(dataset.train.labels) // config.train.batch_size),
            "steps": step,
            "seconds": round(progress.seconds),
            "environment": best.content["environment"],
        },
        "data": {"source": source, "checksum": dataset.checksum},
        "validation": None if progress.best_accuracy is None else {"accuracy": progress.best_accuracy},
        "test": progress.test,
    }
    return from_variables(workdir.name, config, inputs, variables, card)


def save(
    trained: Pretrained,
    name: str,
    folder: str | Path,
    *,
    command: str,
    commit: str,
    machine: str,
    date: str,
    note: str = "",
) -> Path:
    """Writes the weights and the card of a run's network; a file that exists is left as it is.

    Args:
        trained: What `from_run` gave.
        name: What `load_pretrained` is to call it.
        folder: Where to write; made if it is missing.
        command: How it was trained.
        commit: Of the code that trained it.
        machine: The machine that trained it, in words.
        date: Of the training, YYYY-MM-DD.
        note: Anything else worth knowing.

    Returns:
        The path of the weights; the card lies beside it.

    Raises:
        UserError: The name is taken, the weights exceed `MAX_BYTES`, or the folder cannot be written.
    """
    path = Path(folder) / f"{name}.safetensors"
    for taken in (path, path.with_suffix(".json")):
        if taken.exists():
            raise UserError(f"{taken} exists; choose another --name or another --out")
    data = weights.to_bytes(trained.variables)
    if len(data) > MAX_BYTES:
        raise UserError(
            f"the weights of {trained.name} take {len(data):,} bytes, more than the {MAX_BYTES:,} that such "
            "a file may "
            "have; give the run's folder away instead"
        )
    card = {
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        **{key: trained.card[key] for key in ("inputs", "validation", "test", "data")},
        "training": {
            **trained.card["training"],
            "command": command,
            "commit": commit,
            "date": date,
            "machine": machine,
        },
        "config": without_folders(trained.card["config"]),
    }
    if note:
        card["note"] = note
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        write_atomically(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name an --out you may write to"
        ) from error
    return path


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Plain settings without the folders of whoever trained with them."""
    origin = config["train"]["init_from"]
    if os.path.isabs(origin) or "://" in origin:
        origin = f"runs/{Path(origin).name}"
    return {
        **config,
        "data": {**config["data"], "dir": "", "cache_dir": ""},
        "train": {**config["train"], "init_from": origin},
    }
