"""A transition, traced once and followed with a rule in the place of `fire`.

Every population's state goes in and comes out as a value. So `fire` may stand inside `jit`, `vmap`, `scan`, `cond` and
`remat`, and each time loop, solver and derivative reads the same trace.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from mpisjax.errors import UserError
from mpisjax.firing.primitive import Fired, Rates, Rule, fire, fire_p, put_together
from mpisjax.hoisting import bind, read
from mpisjax.meshes import layout, typed_like


@dataclasses.dataclass(frozen=True)
class Population:
    """A population of neurons, as its current shows it.

    Attributes:
      shape: of the current; that of a population inside a `scan` has a leading axis for the iterations.
      dtype: of the current.
      sharding: how the current lies on a mesh with explicit axes.
      scans: how many leading axes are iterations.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    scans: int = 0

    def repeated(self, length: int) -> Population:
        """The populations of all iterations of a scan as one. Iterations are not split over a mesh."""
        sharding = self.sharding.update(spec=PartitionSpec(None, *self.sharding.spec))
        return Population((length, *self.shape), self.dtype, sharding, self.scans + 1)


class Traced(NamedTuple):
    """A function of array pytrees that calls `fire`, traced.

    Attributes:
      jaxpr: its equations; its constants are `consts`.
      consts: what it closes over.
      out_tree: structure of what it returns.
      populations: every population by name, in the order in which they fire.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    out_tree: Any
    populations: dict[str, Population]

    @property
    def result(self) -> Any:
        """Shapes and dtypes of what it returns."""
        avals: list[Any] = [v.aval for v in self.jaxpr.outvars]
        return jax.tree.unflatten(self.out_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])

    @property
    def layouts(self) -> Any:
        """How what it returns lies on a mesh with explicit axes."""
        return jax.tree.unflatten(self.out_tree, [layout(v.aval) for v in self.jaxpr.outvars])


def trace(fn: Callable[..., Any], *args: Any) -> Traced:
    """Traces `fn(*args, fire)`.

    Raises:
      UserError: two populations have one name, or `fire` stands where it cannot be read.
    """
    closed, shapes = jax.make_jaxpr(lambda *a: fn(*a, fire), return_shape=True)(*args)
    populations: dict[str, Population] = {}
    for name, population in _populations(closed.jaxpr):
        if name in populations:
            raise UserError(
                f"fire() was called twice with the name {name!r}: give every neuron population of the "
                "transition a name of its own."
            )
        populations[name] = population
    return Traced(closed.jaxpr, closed.consts, jax.tree.structure(shapes), populations)


def trace_transition(fn: Callable[..., Any], params: PyTree, init: Rates, x: PyTree) -> tuple[Traced, Rates]:
    """Traces a transition on rates of the type that it returns.

    Returns:
      `(traced, init)`: `init` varies, and lies on a mesh, as the transition's rates do.
    """
    for _ in range(3):
        traced = trace(fn, params, init, x)
        avals = [v.aval for v in traced.jaxpr.outvars]
        if len(avals) != len(jax.tree.leaves(init)):
            break  # refused by whoever asked
        new = typed_like(init, avals)
        if all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(init), strict=True)):
            break
        init = new
    return traced, init


def _describe(tree: Any) -> list[str]:
    return [
        f"{jax.tree_util.keystr(path) or 'rates'}: {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def check_rates(what: str, out: Any, init: Any) -> None:
    """Refuses, in one sentence, rates that are not what `init` promises.

    Args:
      what: "transition" or "step".
      out: shapes and dtypes of the rates that it returns.
      init: the rates to start from.

    Raises:
      UserError: structure, shapes or dtypes differ.
    """
    structures: list[Any] = [jax.tree.structure(out), jax.tree.structure(init)]
    if structures[0] != structures[1]:
        raise UserError(
            f"the {what} returns rates of structure {structures[0]} but init is of structure {structures[1]}: give "
            "both the same structure, shapes and dtypes."
        )
    if _describe(out) != _describe(init):
        raise UserError(
            f"the {what} returns rates {_describe(out)} but init is {_describe(init)}: give both the same "
            "structure, shapes and dtypes."
        )


def _fires(jaxpr: Jaxpr) -> bool:
    return any(e.primitive is fire_p or any(map(_fires, jaxprs_in_params(e.params))) for e in jaxpr.eqns)


def _holds_fire(eqn: JaxprEqn) -> bool:
    return any(map(_fires, jaxprs_in_params(eqn.params)))


def _populations(jaxpr: Jaxpr) -> Iterator[tuple[str, Population]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is fire_p:
            aval: Any = eqn.invars[0].aval
            yield eqn.params["name"], Population(aval.shape, aval.dtype, aval.sharding)
        elif _holds_fire(eqn):
            if eqn.primitive.name not in _NESTED:
                raise UserError(
                    f"fire() is called inside {eqn.primitive.name!r}, where a neuron's state cannot be followed: call "
                    "it outside, or inside jit, vmap, scan, cond or remat (a loop of fixed length is a jax.lax.scan)."
                )
            for inner in jaxprs_in_params(eqn.params):
                for name, found in _populations(inner):
                    if eqn.primitive.name == "scan":
                        found = found.repeated(eqn.params["length"])
                    yield name, found


def follow(traced: Traced, rule: Rule, states: dict[str, Any], *args: Any) -> tuple[Any, dict[str, Any]]:
    """Runs a traced function with `rule` in the place of `fire`.

    Args:
      traced: the function.
      rule: what becomes of a population.
      states: by population, what `rule` is given; populations that are missing get None.
      *args: the function's arguments, as it was traced with.

    Returns:
      `(result, states)`: what the function returns, and by population the state that `rule` returned. Of a population
      inside a `scan` the states of all iterations are stacked on a leading axis.
    """
    out, states = _follow(traced.jaxpr, traced.consts, jax.tree.leaves(args), states, rule)
    return jax.tree.unflatten(traced.out_tree, out), {k: states[k] for k in traced.populations}


def _follow(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], states: dict[str, Any], rule: Rule
) -> tuple[list[Any], dict[str, Any]]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    found: dict[str, Any] = {}
    for eqn in jaxpr.eqns:
        values = read(env, eqn.invars)
        if eqn.primitive is fire_p:
            name, (current, *arrays) = eqn.params["name"], values
            neuron = put_together(eqn.params["constants"], arrays)
            activity, found[name] = rule(name, neuron, current, states.get(name))
            if activity.shape != current.shape or activity.dtype != current.dtype:
                raise UserError(
                    f"the neuron of the population {name!r} gives an activity of "
                    f"{activity.dtype}{list(activity.shape)} for a current of {current.dtype}{list(current.shape)}: "
                    "return the current's shape and dtype."
                )
            out = [activity]
        elif _holds_fire(eqn):
            out, inner = _NESTED[eqn.primitive.name](eqn, values, states, rule)
            found.update(inner)
        else:
            out = bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return read(env, jaxpr.outvars), found


def _unfired(struct: Any, state: Any) -> Any:
    """What a rule would give for a population that was not reached: its state as it was, and no activity."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), struct)
    return zeros._replace(state=state) if isinstance(zeros, Fired) else zeros


class OfAllBranches(dict):
    """No states, and a wish for those of all branches of a `cond`."""


def _inline(eqn: JaxprEqn, values: list[Any], states: dict[str, Any], rule: Rule) -> Any:
    closed = eqn.params["jaxpr"]
    return _follow(closed.jaxpr, closed.consts, values, states, rule)


def _remat(eqn: JaxprEqn, values: list[Any], states: dict[str, Any], rule: Rule) -> Any:
    names = [name for name, _ in _populations(eqn.params["jaxpr"])]

    @functools.partial(jax.checkpoint, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    def again(values: list[Any], states: dict[str, Any]) -> Any:
        return _follow(eqn.params["jaxpr"], (), values, states, rule)

    return again(values, {k: states[k] for k in names if k in states})


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried. JAX 0.12 keeps trees of them."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _scan(eqn: JaxprEqn, values: list[Any], states: dict[str, Any], rule: Rule) -> Any:
    p, closed = eqn.params, eqn.params["jaxpr"]
    first, num_carry = _scan_counts(p)
    last = first + num_carry
    consts, carry, xs = values[:first], values[first:last], values[last:]
    names = [name for name, _ in _populations(closed.jaxpr)]

    def body(carry: list[Any], slices: Any) -> Any:
        x, states = slices
        out, found = _follow(closed.jaxpr, closed.consts, [*consts, *carry, *x], states, rule)
        return out[:num_carry], (out[num_carry:], found)

    carry, (ys, found) = jax.lax.scan(
        body,
        carry,
        (xs, {k: states[k] for k in names if k in states}),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys], found


def _cond(eqn: JaxprEqn, values: list[Any], states: dict[str, Any], rule: Rule) -> Any:
    """A branch that is not taken leaves its populations as they were; without a state they are silent."""
    index, *operands = values
    branches = eqn.params["branches"]

    def run(closed: Any, operands: list[Any]) -> Any:
        return _follow(closed.jaxpr, closed.consts, operands, states, rule)

    if isinstance(states, OfAllBranches):
        every = [run(closed, operands) for closed in branches]
        return every[0][0], {name: state for _, found in every for name, state in found.items()}
    results = [jax.eval_shape(functools.partial(run, closed), operands)[1] for closed in branches]
    silent = {name: _unfired(struct, states.get(name)) for found in results for name, struct in found.items()}

    def branch(closed: Any) -> Callable[[list[Any]], Any]:
        def whole(operands: list[Any]) -> Any:
            out, found = run(closed, operands)
            return out, {**silent, **found}

        return whole

    return jax.lax.switch(index, [branch(closed) for closed in branches], operands)


_NESTED: dict[str, Callable[..., Any]] = {
    "jit": _inline,
    "pjit": _inline,
    "checkpoint": _remat,
    "remat2": _remat,
    "scan": _scan,
    "cond": _cond,
}


def sources(traced: Traced, tags: Sequence[str]) -> list[frozenset[str]]:
    """What each output depends on: the tags of the inputs it can see, and "fire" if a population lies on the way.

    Args:
      traced: the function.
      tags: one for each of its flat inputs.
    """
    found = dict(zip(traced.jaxpr.invars, (frozenset({tag}) for tag in tags), strict=True))
    nothing = frozenset[str]()

    def of(atom: Any) -> frozenset[str]:
        return nothing if isinstance(atom, Literal) else found.get(atom, nothing)

    for eqn in traced.jaxpr.eqns:
        seen = nothing.union(*map(of, eqn.invars))
        if eqn.primitive is fire_p or _holds_fire(eqn):
            seen |= {"fire"}
        found.update((v, seen) for v in eqn.outvars)
    return [of(v) for v in traced.jaxpr.outvars]
