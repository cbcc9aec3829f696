"""Floating-point operations of the convolutions and matrix products in a traced function, loops included.

A multiplication and an addition are two operations. Taps that fall on padding count; taps on the zeros that a
strided transposed convolution inserts do not. Everything else (neurons, normalisation, augmentation) counts
nothing: the figure is the arithmetic that cannot be avoided by fusing better. It is nominal: an algorithm
that convolves with fewer multiplications on some platform changes the time, not the count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


class Counter:
    """Counts one traced function.

    A `while` loop's trip count is not in the program: `trips` gives, in program order, those of the loops
    that contain convolutions or matrix products.

    Attributes:
        loops: How many such loops were met.
    """

    def __init__(self, trips: list[float]) -> None:
        self._trips, self.loops = list(trips), 0

    def count(self, jaxpr: core.Jaxpr) -> float:
        """Operations of one run of `jaxpr`."""
        return sum((self._equation(eqn) for eqn in jaxpr.eqns), 0.0)

    def _equation(self, eqn: Any) -> float:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            return _convolution(eqn)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
        if name == "scan":
            return eqn.params["length"] * self.count(eqn.params["jaxpr"].jaxpr)
        if name == "while":
            before = self.loops
            self.loops += 1
            body = self.count(eqn.params["body_jaxpr"].jaxpr)
            if not body:
                self.loops = before
                return 0.0
            if before >= len(self._trips):
                raise ValueError(f"loop {before + 1} with convolutions has no trip count: give it in `trips`")
            return self._trips[before] * body
        if name == "cond" and "branches_platforms" in eqn.params:
            # One form of the same arithmetic a platform: the last is the plain one, which is what counts.
            return self.count(eqn.params["branches"][-1].jaxpr)
        if name == "custom_linear_solve":  # it also holds the transposed solve and the products, which do not run
            return self.count(eqn.params["jaxprs"].solve.jaxpr)
        if "on_cpu" in eqn.params:  # the same of a convolution (`mpisjax.nn.convolution`)
            return self.count(eqn.params["plain"].jaxpr)
        return sum((self.count(inner) for inner in _inner(eqn.params)), 0.0)


def _convolution(eqn: Any) -> float:
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel[d] for d in numbers.rhs_spec[1:])  # input features and space
    inserted = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * eqn.outvars[0].aval.size * taps / inserted


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def count(fn: Callable[..., Any], *arguments: Any, trips: list[float] | None = None) -> float:
    """Operations of `fn(*arguments)`; see `Counter` for `trips`."""
    return Counter(trips or []).count(jax.make_jaxpr(fn)(*arguments).jaxpr)
