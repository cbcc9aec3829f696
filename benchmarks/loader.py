"""Images per second of the input pipeline, beside those of the training step that it feeds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mpisjax import data
from mpisjax.configuration import config_files, makers
from mpisjax.errors import UserError
from mpisjax.training.run import Parts, assemble

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ("digits", "saccade_digits")
# Those that need --data_dir. The last has the paper's 30 million parameters; a step takes seconds on a CPU.
FROM_FILES = ("fashion_mnist", "nmnist:subset", "cifar100")


def rate(run: Callable[[int], Any], repeats: int, batch_size: int) -> float:
    """Images per second; waits for each run, after one to warm up."""
    jax.block_until_ready(run(0))
    began = time.perf_counter()
    for step in range(repeats):
        jax.block_until_ready(run(step))
    return repeats * batch_size / (time.perf_counter() - began)


def find_data(config: ml_collections.ConfigDict, data_dir: str) -> ml_collections.ConfigDict:
    """Sets where a config's data are: in `data_dir`, or in the folder there named after the data set."""
    if data_dir and config.data.name not in EMBEDDED:
        inside = os.path.join(data_dir, config.data.name)
        config.data.dir = inside if os.path.isdir(inside) else data_dir
    return config


def config_of(name: str, data_dir: str = "") -> ml_collections.ConfigDict:
    """The settings of `configs/NAME.py[:VARIANT]`, with its data in `data_dir`."""
    file, _, variant = name.partition(":")
    config = config_files.load_config(str(ROOT / "configs" / f"{file}.py") + (f":{variant}" if variant else ""))
    return find_data(config, data_dir)


def those_at_hand(names: Iterable[str], data_dir: str) -> Iterator[str]:
    """The configs whose data are found; says which are left out, and why, so that no run ends for one of them."""
    refused: dict[str, str] = {}
    for name in names:
        config = config_of(name, data_dir)
        if config.data.name not in refused:
            try:
                makers.make_dataset(config)
                refused[config.data.name] = ""
            except UserError as error:
                refused[config.data.name] = str(error)
        if refused[config.data.name]:
            print(f"{name} is left out: {refused[config.data.name]}", file=sys.stderr)
        else:
            yield name


def training_rate(config: ml_collections.ConfigDict, parts: Parts, repeats: int) -> float:
    """Images per second of the training step alone, on a batch that is loaded already."""
    step = makers.make_train_step(config, parts.net, parts.dataset, parts.feed.steps_per_epoch, parts.mesh)
    batch = parts.feed.batch(0)
    state = jax.tree.map(jnp.copy, parts.state)  # donated

    def once(_: int) -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return rate(once, repeats, config.train.batch_size)


def measure(data_dir: str = "", *, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each config: the loader, with augmentation too, the training step, and their ratio.

    Args:
        data_dir: The data sets' files, or folders named after the sets; without it only the sets that come
            with their libraries. A set that is not there is left out.
        quick: Fewer batches and steps.
    """
    rows = []
    names = EMBEDDED[:1] if quick else EMBEDDED
    for name in (*names, *(those_at_hand(FROM_FILES, data_dir) if data_dir else ())):
        config = config_of(name, data_dir)
        parts = assemble(config)
        batch_size = config.train.batch_size
        augment = jax.jit(lambda key, images, settings=config.data.augment: data.augment(key, images, settings))

        def augmented(step: int, feed: data.Feed = parts.feed, augment: Any = augment) -> jax.Array:
            return augment(jax.random.key(step), feed.batch(step).images)

        batches, steps = (20, 3) if quick else (200, 10)
        loaded = rate(parts.feed.batch, batches, batch_size)
        trained = training_rate(config, parts, 2 if name == "cifar100" else steps)
        rows.append(
            {
                "config": name,
                "batch": batch_size,
                "loader, images/s": loaded,
                "with augmentation, images/s": rate(augmented, batches // 4, batch_size),
                "training step, images/s": trained,
                "loader / step": loaded / trained,
            }
        )
    return rows
