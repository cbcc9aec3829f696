"""Carries of loops on a mesh: a loop wants what it starts from in the types that its body gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def carried(body: Callable[[Any], Any], carry: Any) -> Any:
    """`carry`, varying and laid out as `body` returns it.

    A constant is the same on every device. Inside `shard_map`, or on a mesh with explicit axes, what a body makes of it
    with the batch is not, and JAX refuses a loop whose carry changes its type. Elsewhere nothing is done.

    Args:
      body: carry -> carry.
      carry: a pytree of arrays.
    """
    for _ in range(3):  # one leaf's type may pass through two others
        out = jax.make_jaxpr(body)(carry).out_avals
        leaves, structure = jax.tree.flatten(carry)
        new = [_typed(leaf, aval) for leaf, aval in zip(leaves, out, strict=True)]
        if all(a is b for a, b in zip(new, leaves, strict=True)):
            break
        carry = jax.tree.unflatten(structure, new)
    return carry


def _varying(aval: Any) -> frozenset[str]:
    """The mesh axes along which a value inside `shard_map` varies."""
    kind = getattr(aval, "mat", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def _typed(leaf: Any, aval: Any) -> Any:
    has = jax.typeof(leaf)
    missing = _varying(aval) - _varying(has)
    if missing:
        leaf = jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")
    if not aval.sharding.mesh.empty and aval.sharding.spec != has.sharding.spec:
        leaf = jax.sharding.reshard(leaf, aval.sharding)
    return leaf
