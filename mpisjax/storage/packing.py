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
    return {jax.tree_util.keystr(place): f"{leaf.dtype}{list(leaf.shape)}" for place, leaf in leaves}


def saved_shapes(layout: Mapping[str, str], template: Any) -> tuple[Any, str | None]:
    """The shapes of a saved state, as the template's tree; or where the two differ.

    Args:
        layout: `layout_of` the saved state, without keys.
        template: A tree of arrays or of shapes with shardings. Its random keys fit those of any implementation.

    Returns:
        The shapes with the template's shardings, and None; or None, and a clause that names the first difference.
    """
    leaves = jax.tree_util.tree_leaves_with_path(template)
    keys = {jax.tree_util.keystr(place) for place, leaf in leaves if is_key(leaf)}
    ours = layout_of(template)
    for place in sorted(layout.keys() | ours.keys()):
        if layout.get(place) != ours.get(place) and not (place in layout and place in keys):
            return (
                None,
                f"{place} is {layout.get(place, 'absent')} there and {ours.get(place, 'absent')} here",
            )

    def saved(place: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        dtype, _, shape = layout[jax.tree_util.keystr(place)].partition("[")
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(tuple(json.loads(f"[{shape}")), dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(saved, template), None


def is_key(leaf: Any) -> bool:
    """Whether an array is a random key with an implementation (`jax.random.key`)."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(state: Any) -> tuple[dict[str, str], Any]:
    """The implementation of each random key by its place, and the state with the keys' integers in their place."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    impls = {jax.tree_util.keystr(p): str(jax.random.key_impl(leaf)) for p, leaf in leaves if is_key(leaf)}
    return impls, jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def with_keys(arrays: Any, template: Any, impls: Mapping[str, str]) -> Any:
    """The state that `without_keys` was given: integers become keys where the template has them."""

    def one(place: Any, leaf: Any, array: Any) -> Any:
        if not is_key(leaf):
            return array
        return jax.random.wrap_key_data(array, impl=impls[jax.tree_util.keystr(place)])

    return jax.tree_util.tree_map_with_path(one, template, arrays)


def pack(state: Any) -> dict[str, np.ndarray]:
    """All arrays of a dtype as one flat array on the host, in the tree's order; every process must call this."""
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for leaf in jax.tree.leaves(to_host(state)):
        parts[str(leaf.dtype)].append(np.ravel(leaf))
    return {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}


def unpack(flat: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """The arrays that `pack` was given, placed as `shapes` says."""
    rest = dict(flat)

    def take(leaf: Any) -> jax.Array:
        name = str(leaf.dtype)
        piece, rest[name] = rest[name][: leaf.size], rest[name][leaf.size :]
        return to_devices(piece.reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(take, shapes)


def pieces(flat: Mapping[str, np.ndarray], layout: Mapping[str, str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """By place, the arrays of `wanted` out of what `pack` made of a state of this layout."""
    found, starts = {}, dict.fromkeys(flat, 0)
    for place, kind in layout.items():
        dtype, _, shape = kind.partition("[")
        size = math.prod(json.loads(f"[{shape}"))
        if place in wanted:
            leaf, piece = wanted[place], flat[dtype][starts[dtype] : starts[dtype] + size]
            found[place] = to_devices(piece.reshape(leaf.shape), getattr(leaf, "sharding", None))
        starts[dtype] += size
    return found
