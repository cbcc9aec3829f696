"""On a mesh: loops inside `shard_map`, and axes that are explicit.

Inside `shard_map` a constant is the same on every device, and what a loop's body makes of it with the batch is not. JAX
refuses a loop whose carry changes its type so: the loop has to start from the types that its body gives back.

On a mesh with explicit axes the type of an array says how it lies on the devices. Solvers that run sample by sample are
left to the compiler there, in automatic mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def carried(body: Callable[[Any], Any], carry: Any) -> Any:
    """`carry`, varying as `body` returns it. Where nothing in it varies, nothing is done.

    Args:
      body: carry -> carry.
      carry: a pytree of arrays.
    """
    if not any(map(varying, jax.tree.leaves(carry))):
        return carry
    for _ in range(3):  # one leaf's type may pass through two others
        new = typed_like(carry, jax.make_jaxpr(body)(carry).out_avals)
        if all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(carry), strict=True)):
            break
        carry = new
    return carry


def typed_like(tree: Any, avals: list[Any]) -> Any:
    """Arrays that vary as the abstract values do."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_typed(leaf, a) for leaf, a in zip(leaves, avals, strict=True)])


def varying(array: Any) -> frozenset[str]:
    """The mesh axes along which an array inside `shard_map` varies."""
    return _varying(jax.typeof(array))


def _varying(aval: Any) -> frozenset[str]:
    kind = getattr(aval, "mat", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def _typed(leaf: Any, aval: Any) -> Any:
    missing = _varying(aval) - varying(leaf)
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf


def explicit_axes() -> tuple[str, ...]:
    """The explicit axes of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def layout(aval: Any) -> PartitionSpec:
    """How an abstract value lies on a mesh with explicit axes."""
    return aval.sharding.spec


def in_automatic_mode(fn: Callable[..., Any], layouts: Any, *args: Any) -> Any:
    """`fn(*args)` with the explicit axes left to the compiler.

    Args:
      fn: a function of array pytrees.
      layouts: how its results lie: a prefix of their pytree, of `PartitionSpec`.
      *args: its arguments.
    """
    # An array that lies on no mesh has no type there, and its cotangent would come back with the automatic mode's.
    placed = jax.tree.map(lambda a: jax.sharding.reshard(a, jax.typeof(a).sharding.spec), args)
    return jax.sharding.auto_axes(fn, axes=explicit_axes(), out_sharding=layouts)(*placed)
