"""Samples are separate problems: a solver written for one, run for each, over a map that takes the whole batch.

`jax.vmap` runs a solver for one sample on all of them: each stops, mixes and chooses for itself. The map it iterates is
known for the batch alone (a network's constants hold all samples), so what the solver calls is a stand-in, which
becomes the map when `vmap` reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

Map = Callable[[list[Any], Any], Any]

_stand_in_p = Primitive("map_of_a_batch")
_stand_in_p.multiple_results = True
_stand_in_p.def_abstract_eval(lambda *operands, num_constants, **params: operands[num_constants:])


def _batched(
    operands: Sequence[Any], dims: Sequence[Any], *, fn: Map, structure: Any, num_constants: int, axis: int
) -> Any:
    constants, leaves = list(operands[:num_constants]), operands[num_constants:]
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    whole = [
        jnp.broadcast_to(jnp.expand_dims(leaf, axis), (*leaf.shape[:axis], size, *leaf.shape[axis:]))
        if d is None
        else jnp.moveaxis(leaf, d, axis)
        for leaf, d in zip(leaves, dims[num_constants:], strict=True)
    ]
    out = jax.tree.leaves(fn(constants, jax.tree.unflatten(structure, whole)))
    return out, [axis] * len(out)


def _transposed(
    cotangents: Sequence[Any], *operands: Any, fn: Map, structure: Any, num_constants: int, axis: int
) -> Any:
    avals = [o.aval if ad.is_undefined_primal(o) else jax.typeof(o) for o in operands[num_constants:]]
    full = [jnp.zeros(a.shape, a.dtype) if type(ct) is ad.Zero else ct for ct, a in zip(cotangents, avals, strict=True)]

    def transpose(constants: list[Any], tree: Any) -> Any:
        return jax.linear_transpose(lambda v: fn(constants, v), tree)(tree)[0]

    back = _stand_in_p.bind(
        *operands[:num_constants],
        *full,
        fn=transpose,
        structure=structure,
        num_constants=num_constants,
        axis=axis,
    )
    return [*[None] * num_constants, *back]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, num_constants: int, **params: Any) -> Any:
    """Of a map that is linear in its tree; the constants are not differentiated."""
    constants, leaves = primals[:num_constants], primals[num_constants:]
    along = [ad.instantiate_zeros(t) for t in tangents[num_constants:]]
    out, moved = (
        _stand_in_p.bind(*constants, *tree, num_constants=num_constants, **params) for tree in (leaves, along)
    )
    return out, moved


batching.primitive_batchers[_stand_in_p] = _batched
ad.primitive_jvps[_stand_in_p] = _jvp
ad.primitive_transposes[_stand_in_p] = _transposed


@jax.custom_batching.custom_vmap
def any_sample(flag: jax.Array) -> jax.Array:
    """Whether a scalar flag holds for any sample that a solver runs for.

    As the condition of a `while_loop` it is one for all samples. `jax.vmap` would otherwise choose between the old and
    the new value of everything that the loop carries, sample by sample, in passes of their own.
    """
    return flag


@any_sample.def_vmap
def _any_of_batch(_: int, in_batched: list[bool], flag: jax.Array) -> tuple[jax.Array, bool]:
    return (jnp.any(flag, 0) if in_batched[0] else flag), False


def chosen(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where a scalar condition holds, else `old`, for each leaf of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def for_each_sample(
    solve: Callable[[Callable[[Any], Any], Any], Any],
    fn: Map,
    constants: list[Any],
    tree: Any,
    batch_axis: int | None,
) -> Any:
    """Runs `solve(one, sample)` for each sample of a batch.

    Args:
      solve: a solver for one sample: given a map from a tree to the like, and the sample's tree.
      fn: `fn(constants, tree) -> tree` of the whole batch, samples independent of each other; it closes over nothing
        traced. Where a solver wants its transpose, it is linear.
      constants: arrays.
      tree: pytree with the samples on `batch_axis` of every leaf.
      batch_axis: None: the whole tree is one problem, for maps that couple their samples.

    Returns:
      What `solve` returns: on axis 0 of every leaf the samples, except that leaves of the tree's rank have them on
      `batch_axis`.
    """
    if batch_axis is None:
        return solve(lambda t: fn(constants, t), tree)
    leaves, structure = jax.tree.flatten(tree)
    # A negative axis counts from a leaf's end, and leaves may differ in rank: bring the samples to the front.
    axes = [batch_axis % leaf.ndim for leaf in leaves]

    def front(t: Any) -> Any:
        flat = [jnp.moveaxis(a, n, 0) for a, n in zip(jax.tree.leaves(t), axes, strict=True)]
        return jax.tree.unflatten(structure, flat)

    def back(t: Any) -> Any:
        flat = [jnp.moveaxis(a, 0, n) for a, n in zip(jax.tree.leaves(t), axes, strict=True)]
        return jax.tree.unflatten(structure, flat)

    def whole(constants: list[Any], t: Any) -> Any:
        return front(fn(constants, back(t)))

    def one(t: Any) -> Any:
        out = _stand_in_p.bind(
            *constants,
            *jax.tree.leaves(t),
            fn=whole,
            structure=structure,
            num_constants=len(constants),
            axis=0,
        )
        return jax.tree.unflatten(structure, out)

    value, rest = jax.vmap(lambda t: solve(one, t))(front(tree))
    return back(value), rest
