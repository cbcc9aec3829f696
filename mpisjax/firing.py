"""`fire(name, current)`: where a transition's neurons sit, and how a reading gives them values.

A transition is traced once, with `fire` as a primitive that means nothing yet. Reading the trace puts neurons in its
place: their rates, or one spiking step of theirs. Every population's state goes in and comes out as a value, so `fire`
may stand inside `jit`, `vmap`, `scan`, `cond` and `remat`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, jaxprs_in_params
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from mpisjax.errors import UserError
from mpisjax.hoisting import bind, read
from mpisjax.meshes import layout, typed_like
from mpisjax.neurons import Neuron

Rates = TypeVar("Rates")
Fire = Callable[..., Array]
"""`fire(name, current, neuron=None) -> activity`: one population of neurons, named uniquely within a transition."""
Transition = Callable[[PyTree, Rates, PyTree, Fire], Rates]
"""`transition(params, rates, x, fire) -> rates`: a network, written once. It returns a pytree like `rates`."""
EquivalentStep = Callable[[PyTree, Rates, PyTree, Fire], tuple[Rates, PyTree]]
"""`step(params, rates, x, fire) -> (rates, aux)`: the one step that is differentiated, where it is not the
transition."""
Rule = Callable[[str, Neuron | None, Array, Any], tuple[Array, Any]]
"""`rule(name, neuron, current, state) -> (activity, state)`: what a reading makes of a population."""

fire_p = Primitive("fire")
fire_p.def_abstract_eval(lambda current, *arrays, **params: current)


def _batched(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Array, int]:
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    moved = [
        jnp.broadcast_to(o, (size, *o.shape)) if d is None else jnp.moveaxis(o, d, 0)
        for o, d in zip(operands, dims, strict=True)
    ]
    return fire_p.bind(*moved, **params), 0


def _not_here(*args: Any, **params: Any) -> Any:
    raise UserError(
        f"the population {params['name']!r} is differentiated inside the transition: take derivatives of the "
        "equilibrium, outside it."
    )


batching.primitive_batchers[fire_p] = _batched
ad.primitive_jvps[fire_p] = _not_here


class _Constants(NamedTuple):
    """A neuron without its arrays: hashable."""

    structure: Any
    leaves: tuple[Any, ...]  # None where an array goes


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or a NumPy number; Python numbers, functions and strings are not."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _taken_apart(neuron: Any, current: Array, name: str) -> tuple[list[Array], _Constants]:
    leaves, structure = jax.tree.flatten(neuron)
    arrays = []
    for leaf in filter(is_array, leaves):
        try:
            same = jnp.broadcast_to(leaf, current.shape)
        except ValueError as error:
            raise UserError(
                f"the population {name!r} has a current of shape {list(current.shape)} and a neuron with a parameter "
                f"of shape {list(np.shape(leaf))}: make them fit, one value a channel, say."
            ) from error
        # A selection, which XLA drops, gives it the current's type on a mesh.
        arrays.append(jax.lax.select(jnp.ones(current.shape, bool), same, current.astype(same.dtype)))
    return arrays, _Constants(structure, tuple(None if is_array(leaf) else leaf for leaf in leaves))


def _put_together(constants: _Constants, arrays: Sequence[Array]) -> Neuron | None:
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is None else leaf for leaf in constants.leaves]
    return jax.tree.unflatten(constants.structure, leaves)


def fire(name: str, current: Float[Array, "*population"], neuron: Neuron | None = None) -> Float[Array, "*population"]:
    """A population of neurons, as the transition is traced with it.

    Args:
      name: unique within the transition.
      current: float array, whatever its shape: one neuron an entry.
      neuron: the population's own neuron; None for the network's.

    Raises:
      UserError: the arguments do not fit.
    """
    if not isinstance(name, str):
        raise UserError(
            f"fire was given {type(name).__name__!r} for a name: call it as fire(name, current), in that order."
        )
    try:
        current = jnp.asarray(current)
    except TypeError as error:
        raise UserError(
            f"fire({name!r}, ...) was given {type(current).__name__!r} for a current: give it an array."
        ) from error
    if not jnp.issubdtype(current.dtype, jnp.floating):
        raise UserError(f"the population {name!r} has a current of dtype {current.dtype}: make it a float.")
    if 0 in current.shape:
        raise UserError(
            f"the population {name!r} has a current of shape {list(current.shape)}, which holds no neuron: give every "
            "axis a length of at least 1."
        )
    if neuron is not None and (isinstance(neuron, type) or not isinstance(neuron, Neuron)):
        raise UserError(
            f"the population {name!r} has {neuron!r} for a neuron: pass an instance, such as mpisjax.LIF(leak=0.9)."
        )
    arrays, constants = _taken_apart(neuron, current, name)
    # Strong types: activity is an array like any other.
    current = jax.lax.convert_element_type(current, current.dtype)
    return fire_p.bind(current, *arrays, name=name, constants=constants)


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
            neuron = _put_together(eqn.params["constants"], arrays)
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


class _OfAllBranches(dict):
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

    if isinstance(states, _OfAllBranches):
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


# The readings.


def rates(default: Neuron) -> Rule:
    """The rate reading: each population at the rate it settles at. Its state is that rate (DBReLU, Eq. 10)."""

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Array]:
        rate = (neuron or default).rate(current)
        return rate, rate

    return rule


class Fired(NamedTuple):
    """A population after a time step: its neurons' state and their activity."""

    state: Any
    activity: Array


def spikes(default: Neuron, of: Callable[[Neuron], Neuron] = lambda neuron: neuron) -> Rule:
    """The spiking reading: one time step. A population's state is a `Fired`, of which the next step takes the state.

    Args:
      default: the network's neuron.
      of: what is made of each neuron first (a surrogate derivative, say).
    """

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Fired]:
        state, activity = of(neuron or default).step(state, current)
        return activity, Fired(state, activity)

    return rule


def initial_states(
    traced: Traced, default: Neuron, *args: Any, of: Callable[[Neuron], Neuron] = lambda neuron: neuron
) -> dict[str, Any]:
    """The states of all populations before the first step.

    The function is run for the neurons' parameters, which it may compute; under `jit` nothing else of it is left.
    """

    def rule(name: str, neuron: Neuron | None, current: Array, state: Any) -> tuple[Array, Any]:
        state = of(neuron or default).initial_state(current)
        return current, typed_like(state, [jax.typeof(current)] * len(jax.tree.leaves(state)))

    return follow(traced, rule, _OfAllBranches(), *args)[1]


class RateReading:
    """`fire` read as rates, for calling a transition directly: `transition(params, rates, x, RateReading(neuron))`.

    Args:
      neuron: the network's neuron.

    Attributes:
      activity: after the transition ran, the firing rate of every population by name.
    """

    def __init__(self, neuron: Neuron) -> None:
        self.neuron = neuron
        self.activity: dict[str, Array] = {}

    def __call__(self, name: str, current: Array, neuron: Neuron | None = None) -> Array:
        """The population's rate."""
        self.activity[name] = (neuron or self.neuron).rate(current)
        return self.activity[name]
