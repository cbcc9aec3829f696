"""From a run's folder to a network that can be handed out: weights, and a card that says how they were made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from mpisjax import cli, configuration
from mpisjax.data import DataSet, load
from mpisjax.errors import UserError
from mpisjax.pretrained import FOLDER, MAX_BYTES, Inputs, Pretrained, assembled, flat
from mpisjax.pretrained.classes import class_names
from mpisjax.training import record, start
from mpisjax.training.durable import write_atomically


def _anywhere(source: str, config: Any) -> str:
    """What was loaded, without the folder that it was loaded from."""
    return source.replace(config.data.dir, "DIR") if config.data.dir else source


def _elsewhere(origin: str) -> str:
    """What `train.init_from` says, without the folder in which the maker keeps runs."""
    return f"runs/{Path(origin).name}" if os.path.isabs(origin) or "://" in origin else origin


def inputs_of_dataset(dataset: DataSet) -> Inputs:
    """What a network trained on a data set reads."""
    return Inputs(
        name=dataset.name,
        num_classes=dataset.num_classes,
        classes=class_names(dataset.name, dataset.num_classes),
        shape=tuple(int(n) for n in dataset.train.images.shape[1:]),
        mean=tuple(float(m) for m in dataset.mean),
        std=tuple(float(s) for s in dataset.std),
        temporal=dataset.temporal,
    )


def of_run(workdir: str | Path, config: ml_collections.ConfigDict | None = None) -> Pretrained:
    """The best state of a run as `load_pretrained` would give it; its card lacks what only a file has.

    Args:
        workdir: The run's folder.
        config: The run's config, perhaps with another `data.dir`; None reads it from the checkpoint. The data are
            loaded, since normalisation is measured on them.

    Raises:
        UserError: There is no sound checkpoint, or the data are missing or others.
    """
    workdir = Path(workdir)
    chosen = record.best(workdir)
    if config is None:
        config = configuration.completed(configuration.from_plain(chosen.content["config"]))
    dataset = load(config.data)
    if dataset.checksum != chosen.content["data_checksum"]:
        raise UserError(
            f"{workdir} was trained on other data than {config.data.name} here; set config.data.dir"
        )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variables, step = start.best_variables(workdir, dataset, place)
    inputs = inputs_of_dataset(dataset)
    progress = record.progress_of(checkpoint_of_the_end(workdir))
    batches = len(dataset.train.labels) // config.train.batch_size
    card = {
        "config": configuration.to_plain(config),
        "inputs": inputs._asdict(),
        "training": {
            "seed": config.seed,
            "epochs": config.train.epochs,
            "best_epoch": step // batches,
            "steps": step,
            "seconds": round(progress.seconds),
            "environment": chosen.content["environment"],
        },
        # Where the files lay is nobody's business but the maker's.
        "data": {"source": _anywhere(dataset.source, config), "checksum": dataset.checksum},
        "validation": None if progress.best_accuracy is None else {"accuracy": progress.best_accuracy},
        "test": progress.test,
    }
    return assembled(workdir.name, config, inputs, variables, card)


def checkpoint_of_the_end(workdir: Path) -> Any:
    """The run's newest checkpoint, which knows how the run ended."""
    from mpisjax.training import upkeep

    return upkeep.newest(workdir / record.FOLDER, set_aside=False)


def save(
    trained: Pretrained,
    name: str,
    folder: str | Path = FOLDER,
    *,
    command: str | None = None,
    commit: str | None = None,
    machine: str | None = None,
    date: str | None = None,
    note: str = "",
) -> Path:
    """Writes the weights and the card of a run's network.

    Args:
        trained: What `of_run` gave.
        name: What `load_pretrained` is to call it.
        folder: Where to; the package itself by default.
        command: How it was trained; None says it from the config.
        commit: Of the code that trained it; None asks git for the current one.
        machine: That trained it; None describes this one.
        date: Of the training, YYYY-MM-DD; None is today.
        note: Anything else worth knowing.

    Returns:
        The weights' path; the card lies beside it.

    Raises:
        UserError: The weights exceed `MAX_BYTES`, or the folder cannot be written.
    """
    arrays = {
        key: np.ascontiguousarray(value) for key, value in flat(jax.device_get(trained.variables)).items()
    }
    data = safetensors.numpy.save(arrays)
    if len(data) > MAX_BYTES:
        raise UserError(
            f"the weights of {trained.name} take {len(data):,} bytes, more than the {MAX_BYTES:,} that the package may "
            "hold; hand out the run's folder instead"
        )
    settings = trained.card["config"]
    config = {
        **settings,
        "data": {**settings["data"], "dir": "", "cache_dir": ""},
        "train": {**settings["train"], "init_from": _elsewhere(settings["train"]["init_from"])},
    }
    card = {
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "parameters": sum(value.size for key, value in arrays.items() if key.startswith("params/")),
        **{key: trained.card[key] for key in ("inputs", "validation", "test", "data")},
        "training": {
            **trained.card["training"],
            "command": command or training_command(trained.config),
            "commit": commit or current_commit(),
            "date": date or datetime.now(UTC).date().isoformat(),
            "machine": machine or describe_machine(),
        },
        "config": config,
    }
    if note:
        card["note"] = note
    path = Path(folder) / f"{name}.safetensors"
    try:
        write_atomically(path, data)
        write_atomically(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name a --folder you may write to"
        ) from error
    return path


def training_command(config: ml_collections.ConfigDict, root: Path | None = None) -> str:
    """The `train.py` command line whose config this is, less the folder where the data lie.

    The config file is `configs/<data set>.py`, with the variant that leaves the fewest settings to override.
    """
    root = Path.cwd() if root is None else root
    ours = flatten_dict(configuration.to_plain(config), sep=".")
    ours["train.init_from"] = _elsewhere(ours["train.init_from"])
    file = root / "configs" / f"{config.data.name}.py"
    if not file.is_file():
        return f"train.py with the settings of this card (there is no {file})"
    best: tuple[str, dict[str, Any]] | None = None
    for variant in ("", *_variants(file)):
        name = f"configs/{file.name}" + (f":{variant}" if variant else "")
        theirs = flatten_dict(
            configuration.to_plain(cli.load_config(f"{file}:{variant}" if variant else str(file))), sep="."
        )
        differing = {
            key: value
            for key, value in ours.items()
            if theirs.get(key) != value and key not in ("data.dir", "data.cache_dir", "name")
        }
        if best is None or len(differing) < len(best[1]):
            best = (name, differing)
    assert best is not None
    name, differing = best
    config_flag = [] if name == "configs/digits.py" else ["--config", name]
    changes = [f"--config.{key}={_literal(value)}" for key, value in differing.items()]
    return shlex.join(["python", "train.py", *config_flag, *changes])


def _variants(file: Path) -> list[str]:
    from importlib import util

    spec = util.spec_from_file_location("config", file)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(getattr(module, "VARIANTS", {}))


def _literal(value: Any) -> str:
    return str(tuple(value)).replace(" ", "") if isinstance(value, list) else str(value)


def current_commit() -> str:
    """The commit of the working tree that Python runs in, "unknown" outside one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def describe_machine() -> str:
    """Processor, cores and JAX's devices, in words."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = jax.devices()[0]
    return f"{os.cpu_count()}-core {model}; jax {jax.__version__} on {device.platform} ({device.device_kind})"
