"""How the arrays of a checkpoint are written: by orbax, in one piece where one process holds them all.

A training state is a hundred and more small arrays. Written one by one they leave behind what is never given back: threads
of tensorstore's that linger after some saves, and the memory those hold. So a state of which one process holds everything
is written as one flat array a dtype, in the order of the tree; what lies where, the record of the checkpoint says. It also
takes a fifth of the time. States that are split over devices or processes, and those that go to a bucket, are written
array by array, each device's part by its own process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mpisjax.training.processes import count
from mpisjax.training.storage import is_bucket

Layout = dict[str, str]


def layout_of(state: Any) -> Layout:
    """Dtype and shape of every array by its place in the tree, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(place): f"{leaf.dtype}{list(leaf.shape)}" for place, leaf in leaves}


def in_one_piece(path: Path, state: Any) -> bool:
    """Whether `write` puts this state's arrays into one, by dtype."""
    whole = all(getattr(leaf, "is_fully_replicated", True) for leaf in jax.tree.leaves(state))
    return whole and count() == 1 and not is_bucket(path)


def write(path: Path, state: Any) -> None:
    """Writes a pytree of arrays into a new folder; of several processes, each what its devices hold."""
    _no_traces_once()
    one_piece = in_one_piece(path, state)
    # Compressing weights gains a few percent, and keeps 3.4 MB a writer at times, until another save gives it back.
    writer = ocp.PyTreeCheckpointer(use_compression=False, use_ocdbt=not one_piece)
    with contextlib.closing(writer) as checkpointer:
        checkpointer.save(
            _absolute(path), _packed(state) if one_piece else state
        )  # orbax takes no other path


@functools.cache
def _no_traces_once() -> None:
    """Keeps orbax's and tensorstore's threads from printing a trace each of an error that is raised here anyhow.

    Some of them fail after the save has given up, so this lasts.
    """
    hook = sys.unraisablehook

    def from_elsewhere(entry: logging.LogRecord) -> bool:
        # asyncio's entries, of tasks that nobody waits for any more, name the task's file in their text.
        place = entry.getMessage() if entry.name == "asyncio" else entry.pathname
        mere = entry.levelno < logging.ERROR and not place.endswith(
            "ocdbt_utils.py"
        )  # it misses what is not meant to be
        return mere or f"{os.sep}orbax{os.sep}" not in place

    def but_for_a_closed_loop(told: Any) -> None:
        if str(told.exc_value) != "Event loop is closed":  # what tensorstore's calls back then come to
            hook(told)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(from_elsewhere)
    sys.unraisablehook = but_for_a_closed_loop


def read(path: Path, template: Any, *, one_piece: bool) -> Any:
    """The pytree that `write` was given.

    Args:
        path: The folder.
        template: A pytree of arrays (or of shapes with shardings) of the layout that was written; where its arrays lie,
            those that come back do.
        one_piece: How it was written.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        if not one_piece:
            return checkpointer.restore(_absolute(path), abstract)
        sizes: defaultdict[str, int] = defaultdict(int)
        for leaf in jax.tree.leaves(abstract):
            sizes[str(leaf.dtype)] += leaf.size
        flat = {name: np.empty(size, name) for name, size in sizes.items()}
        return _unpacked(checkpointer.restore(_absolute(path), flat), abstract)


def _packed(state: Any) -> dict[str, np.ndarray]:
    pieces: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for leaf in jax.tree.leaves(jax.device_get(state)):
        pieces[str(leaf.dtype)].append(np.ravel(leaf))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


def _unpacked(flat: dict[str, np.ndarray], abstract: Any) -> Any:
    begun: defaultdict[str, int] = defaultdict(int)

    def take(leaf: Any) -> Any:
        name = str(leaf.dtype)
        begin = begun[name]
        begun[name] += leaf.size
        piece = flat[name][begin : begun[name]].reshape(leaf.shape)
        return jax.device_put(
            piece, getattr(leaf, "sharding", None), may_alias=False
        )  # a step overwrites what it is given

    return jax.tree.map(take, abstract)


def _absolute(path: Path) -> Path:
    """Orbax takes no other path; an address in a bucket is one."""
    return path if is_bucket(path) else path.absolute()
