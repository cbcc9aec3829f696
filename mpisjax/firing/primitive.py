"""`fire(name, current)`: where a transition's neurons sit.

A transition is traced once, with `fire` as a primitive that means nothing yet (`tracing.py`). Reading the trace puts
neurons in its place: their rates, or one spiking step of theirs (`readings.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array, Float, PyTree

from mpisjax.errors import UserError
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


class Fired(NamedTuple):
    """A population after a time step: its neurons' state and their activity."""

    state: Any
    activity: Array


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


def put_together(constants: _Constants, arrays: Sequence[Array]) -> Neuron | None:
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
