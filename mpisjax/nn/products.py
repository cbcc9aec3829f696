"""The convolutions and matrix products of a traced network, and which populations' spikes drive them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, jaxprs_in_params

from mpisjax.firing import Population
from mpisjax.firing.primitive import fire_p
from mpisjax.hoisting import bind

PARAMETERS, INPUT, STEP = range(3)  # what a value depends on at most

# Calls of a function whose operands are the equation's own.
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
# Each entry of the result is an entry of an operand, or a sum of entries.
_ARRANGING = {
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims",
    "optimization_barrier", "pad", "reduce_sum", "reduce_window_sum", "reshape", "rev", "slice", "squeeze", "transpose",
}  # fmt: skip


class Value(NamedTuple):
    """A value of the trace.

    Attributes:
        depends: `PARAMETERS`, `INPUT` or `STEP`: the rates of the step before, or a spike.
        spikes: Where it is made of spikes alone, rearranged: the function from all spikes by population to it.
        populations: Whose spikes.
    """

    depends: int
    spikes: Callable[[Mapping[str, Any]], Any] | None = None
    populations: tuple[str, ...] = ()


class NotFollowedError(Exception):
    """A loop or a branch holds a population or a product."""


class Products:
    """Follows traces, and collects their products.

    Attributes:
        additions: Of whole values that are no parameters, in what a time step changes.
    """

    frames = STEP  # what a frame of input over time depends on

    def __init__(self) -> None:
        self._products: list[tuple[JaxprEqn, list[Value]]] = []
        self.additions = 0.0

    def follow(self, jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
        """From what a function is given to what it returns.

        Raises:
            NotFollowedError: A loop or a branch holds a population or a product.
        """
        known = dict(zip(jaxpr.invars, values, strict=True))

        def read(atoms: Sequence[Any]) -> list[Value]:
            return [Value(PARAMETERS) if isinstance(a, Literal) else known.get(a, Value(PARAMETERS)) for a in atoms]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, read(eqn.invars)), strict=True))
        return read(jaxpr.outvars)

    def _equation(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        name, depends = eqn.primitive.name, max((v.depends for v in values), default=PARAMETERS)
        if eqn.primitive is fire_p:
            return [self._activity(eqn.params["name"], depends)]
        inside = list(jaxprs_in_params(eqn.params))
        if depends != PARAMETERS:
            if _is_product(eqn):
                self._products.append((eqn, values))
            elif name in _CALLS:
                return self.follow(next(j for j in inside if len(j.invars) == len(values)), values)
            elif any(map(_counts, inside)):
                raise NotFollowedError
            if name in ("add", "add_any") and depends == STEP and all(v.depends != PARAMETERS for v in values):
                self.additions += _aval(eqn.outvars[0]).size
            if name in _ARRANGING and any(v.spikes for v in values) and all(v.spikes or not v.depends for v in values):
                return _arranged(eqn, values)
        return [Value(depends)] * len(eqn.outvars)

    def _activity(self, population: str, depends: int) -> Value:
        del depends  # a neuron has a past
        return Value(STEP, lambda spikes: spikes[population], (population,))

    def count(self, populations: dict[str, Population]) -> tuple[dict[str, np.ndarray], list[float]]:
        """Adds up what was collected.

        Args:
            populations: Of one sample.

        Returns:
            How many synapses each neuron's spike reaches, by population, without the batch axis; and of the products
            that no spike drives, the multiply-accumulates by what they depend on.
        """
        reached: dict[str, np.ndarray] = {}
        macs = [0.0, 0.0, 0.0]
        for eqn, values in self._products:
            driven = [v for v in values if v.spikes]
            if len(driven) == 1 and all(v.depends == PARAMETERS for v in values if not v.spikes):
                for name, count in _fan_out(eqn, values, {k: populations[k] for k in driven[0].populations}).items():
                    reached[name] = reached.get(name, 0.0) + np.asarray(count[0], np.float64)
            else:
                ones = _operands(eqn, [Value(PARAMETERS)] * len(values), {}, jnp.ones)
                macs[max(v.depends for v in values)] += float(np.asarray(_product(eqn, ones), np.float64).sum())
        return reached, macs


class RateProducts(Products):
    """The same of rates, which drive no additions. Input over time is its mean frame."""

    frames = INPUT

    def _activity(self, population: str, depends: int) -> Value:
        del population
        return Value(depends)


def _aval(atom: Any) -> Any:
    return atom.aval


def _is_product(eqn: JaxprEqn) -> bool:
    """A convolution, as JAX or as `mpisjax.nn.convolution` has it, or a matrix product."""
    return eqn.primitive.name in ("conv_general_dilated", "dot_general") or "on_cpu" in eqn.params


def _counts(jaxpr: Jaxpr) -> bool:
    """Whether populations or products are in there."""
    return any(
        eqn.primitive is fire_p or _is_product(eqn) or any(map(_counts, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _operands(eqn: JaxprEqn, values: Sequence[Value], spikes: Mapping[str, Any], fill: Callable[..., Any]) -> list[Any]:
    """An equation's operands: what is made of the spikes, and zeros or ones, as `fill` says, for the rest."""
    return [
        value.spikes(spikes) if value.spikes else fill(_aval(atom).shape, _aval(atom).dtype)
        for atom, value in zip(eqn.invars, values, strict=True)
    ]


def _arranged(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    populations = tuple(dict.fromkeys(name for value in values for name in value.populations))

    def result(at: int) -> Callable[[Mapping[str, Any]], Any]:
        return lambda spikes: bind(eqn, _operands(eqn, values, spikes, jnp.zeros))[at]

    return [Value(STEP, result(at), populations) for at in range(len(eqn.outvars))]


def _product(eqn: JaxprEqn, operands: Sequence[Any]) -> Any:
    if "plain" in eqn.params:
        return jaxpr_as_fun(eqn.params["plain"])(*operands)[0]
    return bind(eqn, operands)[0]


def _fan_out(eqn: JaxprEqn, values: Sequence[Value], populations: dict[str, Population]) -> dict[str, Any]:
    """The synapses of a product that each spike reaches: its transpose, with weights of 1, of ones."""
    out = _aval(eqn.outvars[0])
    like = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in populations.items()}
    transpose = jax.linear_transpose(lambda spikes: _product(eqn, _operands(eqn, values, spikes, jnp.ones)), like)
    return transpose(jnp.ones(out.shape, out.dtype))[0]
