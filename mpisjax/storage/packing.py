"""A tree of arrays as one flat array for each dtype, and back; random keys as their integers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mpisjax.storage.processes import to_devices, to_host


def layout_of(state: Any) -> dict[str, str]:
    """Dtype and shape of every array by its place in the tree, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(place): _kind(leaf) for place, leaf in leaves}


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def misfit(layout: Mapping[str, str], wanted: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Where a saved state differs from arrays (or shapes) by place: (place, there, here) of the first; None: nowhere.

    A random key fits that of any implementation.
    """
    for place in sorted(layout.keys() | wanted.keys()):
        there, here = layout.get(place, "absent"), _kind(wanted[place]) if place in wanted else "absent"
        if there != here and not (place in layout and place in wanted and is_key(wanted[place])):
            return place, there, here
    return None


def is_key(leaf: Any) -> bool:
    """Whether an array is a random key with an implementation (`jax.random.key`)."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(state: Any) -> tuple[dict[str, str], Any]:
    """The implementation of each random key by its place, and the state with the keys' integers in their place."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    impls = {jax.tree_util.keystr(p): str(jax.random.key_impl(leaf)) for p, leaf in leaves if is_key(leaf)}
    return impls, jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def pack(state: Any) -> dict[str, np.ndarray]:
    """All arrays of a dtype as one flat array on the host, in the tree's order; every process must call this."""
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for leaf in jax.tree.leaves(to_host(state)):
        parts[str(leaf.dtype)].append(np.ravel(leaf))
    return {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}


def unpack(
    flat: Mapping[str, np.ndarray], layout: Mapping[str, str], wanted: Mapping[str, Any], key_impls: Mapping[str, str]
) -> dict[str, Any]:
    """Some of the arrays that `pack` was given.

    Args:
        flat: What it made of a state without keys.
        layout: `layout_of` that state.
        wanted: By place, arrays or shapes; what comes back lies where these do, and is a key where these are.
        key_impls: What `without_keys` gave.

    Returns:
        The arrays by place.
    """
    found, starts = {}, dict.fromkeys(flat, 0)
    for place, kind in layout.items():
        dtype, _, sizes = kind.partition("[")
        shape = tuple(json.loads(f"[{sizes}"))
        start, starts[dtype] = starts[dtype], starts[dtype] + math.prod(shape)
        if place in wanted:
            leaf = wanted[place]
            piece = flat[dtype][start : starts[dtype]].reshape(shape)
            array = to_devices(piece, getattr(leaf, "sharding", None))
            found[place] = jax.random.wrap_key_data(array, impl=key_impls[place]) if is_key(leaf) else array
    return found
