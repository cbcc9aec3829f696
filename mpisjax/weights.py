"""Trained weights on disk: `NAME.safetensors`, arrays and nothing that can execute, and its card,
`NAME.json`.

A card holds the SHA-256 of the weights, which is checked whenever they are read, the config that they were
trained with, and how they were made. The networks of the package lie in `FOLDER`; `python -m
mpisjax.pretrained` writes others.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from mpisjax.errors import UserError

FOLDER = Path(__file__).parent / "pretrained"
Variables = dict[str, Any]


def available(folder: Path = FOLDER) -> list[str]:
    """The names of the networks in a folder; by default of those that come with the package."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def read(name: str, folder: Path = FOLDER) -> tuple[Variables, dict[str, Any]]:
    """Reads and verifies the two files of a network.

    Args:
        name: The network's name.
        folder: Where its files are.

    Returns:
        `{"params": ..., "batch_stats": ...}` as NumPy arrays, and the card.

    Raises:
        UserError: A file is missing, or the weights are not those of the card.
    """
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
        card = json.loads(path.with_suffix(".json").read_bytes())
        promised = card["sha256"]
    except FileNotFoundError as error:
        known = ", ".join(available(folder)) or "none"
        raise UserError(
            f"there is no pretrained network {name!r} ({error.filename} is missing); there are: {known}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.with_suffix('.json')} is not a card; install the package again") from error
    if hashlib.sha256(data).hexdigest() != promised:
        raise UserError(
            f"{path} does not have the SHA-256 that its card promises: it has been cut short or altered; "
            "install the "
            "package again"
        )
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} holds no safetensors ({error}); make it again") from error
    wide = {k: a.astype(np.float32) if a.dtype == np.float16 else a for k, a in arrays.items()}
    return {"batch_stats": {}, **unflatten_dict(wide, sep="/")}, card


def check_fit(found: Variables, wanted: Variables, origin: str) -> None:
    """Refuses the weights of another network.

    Args:
        found: The weights that were read.
        wanted: The network's own variables, or their shapes.
        origin: Where `found` comes from, for the message.

    Raises:
        UserError: `found` has other arrays, shapes or dtypes than `wanted`.
    """
    theirs, ours = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (found, wanted)
    )
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the weights from {origin} are of another network: {name} is {theirs.get(name, 'absent')} "
                "there and "
                f"{ours.get(name, 'absent')} here; use its model settings and its kind of data"
            )


def rounded(variables: Variables) -> Variables:
    """The variables with kernels (float32, two axes or more) rounded to float16, for a file of half the size.

    The largest error is 2^-11 of a weight's size, or 3e-8 where that is more. A kernel with a weight above 65504 stays.
    """
    return jax.tree.map(
        lambda a: a if (half := _half(a)) is None else half.astype(np.float32), jax.device_get(variables)
    )


def to_bytes(variables: Variables) -> bytes:
    """The content of a weights file. A kernel whose values are all float16's is stored as such: nothing is lost."""
    arrays = flatten_dict(jax.device_get(variables), sep="/")
    stored = {k: half if (half := _half(a)) is not None and np.array_equal(half, a) else a for k, a in arrays.items()}
    return safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in stored.items()})


def _half(array: np.ndarray) -> np.ndarray | None:
    """A float32 kernel in float16; None for another array, and for weights that are too large."""
    if array.ndim < 2 or array.dtype != np.float32 or not np.all(np.abs(array) < np.finfo(np.float16).max):
        return None
    return array.astype(np.float16)
