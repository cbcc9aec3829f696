"""Two rewrites of traced functions that let any transition be solved cheaply and safely.

`hoist` moves out of a loop what does not change in it (the injection of a constant input, normalised and
folded weights, flipped kernels), whoever wrote the transition and however. `detach` cuts derivatives, also
through values that the transition closes over. Both follow the documented pattern of a jaxpr interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Var

# Primitives that cost less to run again inside a loop (where they fuse) than to read back as an array.
_CHEAP = frozenset(
    # platform_index: XLA must see that it is a constant to drop the branches of other platforms.
    {"broadcast_in_dim", "iota", "convert_element_type", "copy", "reshape", "squeeze", "platform_index"}
)


def read(env: dict[Var, Any], atoms: Iterable[Any]) -> list[Any]:
    """The values of variables and literals."""
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in atoms]


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Runs one equation as it was traced: with its name scope (for profiles) and its context."""
    source = eqn.source_info
    name_stack = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=name_stack), eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _run(eqns: Iterable[JaxprEqn], env: dict[Var, Any]) -> None:
    for eqn in eqns:
        env.update(zip(eqn.outvars, bind(eqn, read(env, eqn.invars)), strict=True))


def _needed(eqns: Sequence[JaxprEqn], roots: Iterable[Any]) -> tuple[list[JaxprEqn], set[Var]]:
    """The equations that `roots` depend on, in order, and every variable those read or return."""
    wanted = {v for v in roots if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1], wanted


def hoist(fn: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Splits `fn` into what depends on its arguments and what does not, and runs the latter now.

    Args:
      fn: a function of array pytrees; it may close over arrays, traced ones included.
      *examples: arguments of the right structure, shape and dtype (values are not used).

    Returns:
      `(loop_fn, constants)` with `loop_fn(constants, *args) == fn(*args)`: `constants` is a list of arrays
      computed here, once; `loop_fn` closes over nothing traced.
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*examples)
    jaxpr, out_tree = closed.jaxpr, jax.tree.structure(out_shape)

    varying: set[Any] = set(jaxpr.invars)
    fixed, inner = [], []
    for eqn in jaxpr.eqns:
        if eqn.effects or any(v in varying for v in eqn.invars if not isinstance(v, Literal)):
            varying.update(eqn.outvars)
            inner.append(eqn)
        else:
            fixed.append(eqn)
            if eqn.primitive.name in _CHEAP:
                inner.append(eqn)
    inner, wanted = _needed(inner, jaxpr.outvars)
    made_inside = {v for eqn in inner for v in eqn.outvars} | set(jaxpr.invars)
    # In the order in which they are made, so that the program's text is the same in every process.
    made_before = [*jaxpr.constvars, *(v for eqn in fixed for v in eqn.outvars)]
    constants = [v for v in made_before if v in wanted and v not in made_inside]

    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    _run(_needed(fixed, constants)[0], env)
    values = read(env, constants)
    # The jaxpr may hold traced constants, which a function that outlives the trace must not.
    invars, outvars = list(jaxpr.invars), list(jaxpr.outvars)

    def loop_fn(constant_values: list[Any], *args: Any) -> Any:
        env: dict[Any, Any] = dict(zip(constants, constant_values, strict=True))
        env.update(zip(invars, jax.tree.leaves(args), strict=True))
        _run(inner, env)
        return jax.tree.unflatten(out_tree, read(env, outvars))

    return loop_fn, values


def detach(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` with no derivative, neither through `args` nor through what `fn` closes over."""
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    consts, leaves = jax.lax.stop_gradient((closed.consts, jax.tree.leaves(args)))
    env: dict[Any, Any] = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*consts, *leaves], strict=True))
    _run(closed.jaxpr.eqns, env)
    return jax.tree.unflatten(jax.tree.structure(out_shape), read(env, closed.jaxpr.outvars))
