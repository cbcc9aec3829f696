"""A training state as a checkpoint holds it: random keys as integers, and one flat array for each dtype.

Saved array by array, a state of 140 arrays leaves about 100 KB of memory behind with every save, and takes five times as
long (orbax 0.12.8, tensorstore 0.1.86; docs/robustness.md has the figures). This shows it:

    state = {f"a{i}": jax.numpy.ones(3745) for i in range(140)}
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(60):
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            print(open("/proc/self/statm").read().split()[1])  # resident pages

With `pack(state)` in place of `state` the number stands still.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

KEY_LENGTHS = {2: "threefry2x32", 4: "rbg"}  # of keys in checkpoints that do not name the implementation


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
        impl = impls.get(jax.tree_util.keystr(place)) or KEY_LENGTHS.get(array.shape[-1])
        return jax.random.wrap_key_data(array, impl=impl)

    return jax.tree_util.tree_map_with_path(one, template, arrays)


def is_whole(state: Any) -> bool:
    """Whether each array is whole on every device that has it."""
    return all(getattr(leaf, "is_fully_replicated", True) for leaf in jax.tree.leaves(state))


def pack(state: Any) -> dict[str, np.ndarray]:
    """All arrays of a dtype as one flat array on the host, in the tree's order."""
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for leaf in jax.tree.leaves(jax.device_get(state)):
        parts[str(leaf.dtype)].append(np.ravel(leaf))
    return {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}


def unpack(flat: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """The arrays that `pack` was given, placed as `shapes` says."""
    rest = dict(flat)

    def take(leaf: Any) -> jax.Array:
        name = str(leaf.dtype)
        piece, rest[name] = rest[name][: leaf.size], rest[name][leaf.size :]
        # Not an alias, since a training step overwrites the state that it is given.
        return jax.device_put(piece.reshape(leaf.shape), leaf.sharding, may_alias=False)

    return jax.tree.map(take, shapes)
