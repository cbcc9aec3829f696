"""What a type checker makes of a user's program; mypy reads it with the package (see pyproject.toml)."""

from __future__ import annotations

from typing import NamedTuple, assert_type

import jax

import mpisjax
from mpisjax.firing import Fire


class Streams(NamedTuple):
    first: jax.Array
    second: jax.Array


def transition(params: dict[str, jax.Array], rates: Streams, x: jax.Array, fire: Fire) -> Streams:
    first = fire("first", x @ params["in"] + rates.second @ params["back"])
    return Streams(first, fire("second", first @ params["out"], mpisjax.TernaryIF()))


def solve(params: dict[str, jax.Array], x: jax.Array, init: Streams) -> jax.Array:
    eq = mpisjax.equilibrium_forward(transition, params, x, init, forward=mpisjax.RateForward())
    assert_type(eq, mpisjax.Equilibrium[Streams])
    assert_type(eq.rates, Streams)
    found = mpisjax.simulate(transition, params, x, init, neuron=mpisjax.IF(), forward=mpisjax.SpikeForward(4))
    assert_type(found.rates, Streams)
    return eq.rates.first
