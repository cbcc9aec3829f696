"""What a network of one's own is: a few functions of its variables. `MPIS` is one.

It is written in one of three ways.

As a linen module (`flax.linen`), with methods `initial_rates(images)`, `encode(images, train)`, `transition(rates, x,
fire, train)` and `classify(rates, train)`. Linen gives `init`, and keeps parameters and running statistics. `MPIS` is
written so.

As a module of Flax NNX, with the same methods. It brings its first weights; its `nnx.Param` are trained, and its
`nnx.BatchStat` are the running statistics.

In any other way, as an object with the functions of `Network`. They take the variables first and are pure, so that
plain JAX and Equinox fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, cast

import flax.linen as nn
import jax
from jaxtyping import Float, PyTree

from mpisjax.errors import UserError
from mpisjax.firing import Fire
from mpisjax.nn.mpis import MPIS

Array = jax.Array
Variables: TypeAlias = dict[str, PyTree]
Rates: TypeAlias = PyTree[Float[Array, "batch ..."]]
Currents: TypeAlias = PyTree[Float[Array, "..."]]
METHODS = ("init", "initial_rates", "encode", "transition", "classify")


class Network(Protocol):
    """A network as pure functions.

    `variables` is `{"params": ..., "batch_stats": ...}`: what is trained, and running statistics (`{}` without any).
    The functions with `train` also return the running statistics after them: the given ones where nothing was gathered.
    In the solve and in the simulation `train` is False; it is True in the one differentiable step of training, so that
    batch normalisation is affine while the equilibrium is sought.

    An attribute `temporal = True` says that images are frames over time.
    """

    def init(self, key: Array, images: Array) -> Variables:
        """Random variables for images [batch, H, W, C] (temporal: [time, batch, H, W, C])."""

    def initial_rates(self, images: Array) -> Rates:
        """Zeros of the rates that are fed back, a pytree of [batch, ...], for a batch of images."""

    def encode(self, variables: Variables, images: Array, train: bool) -> tuple[Currents, PyTree]:
        """What drives the neurons, constant over the time steps; and running statistics."""

    def transition(
        self, variables: Variables, rates: Rates, x: Currents, fire: Fire, train: bool
    ) -> tuple[Rates, PyTree]:
        """One pass: rates -> rates; and running statistics. `fire(name, current)` is a population of neurons."""

    def classify(self, variables: Variables, rates: Rates, train: bool) -> tuple[Array, PyTree]:
        """Rates -> logits [batch, num_classes]; and running statistics."""


def as_module(network: Any) -> MPIS:
    """A network of one's own as the package calls `MPIS`: with linen's `init` and `apply`.

    Args:
        network: A linen module, an NNX module or a `Network`, as this file says.

    Returns:
        An `MPIS` as it is; else an object that stands for the network.

    Raises:
        UserError: The network lacks a method.
    """
    if isinstance(network, MPIS | _Module):
        return cast(MPIS, network)
    nnx = sys.modules.get("flax.nnx")  # imported by whoever has a module of it
    kind: type[_Module] = _Linen if isinstance(network, nn.Module) else _Functions
    wanted: tuple[str, ...] = METHODS
    if nnx is not None and isinstance(network, nnx.Module):
        kind, wanted = _NNX, METHODS[1:]
    missing = [name for name in wanted if not callable(getattr(network, name, None))]
    if missing:
        raise UserError(
            f"the network {type(network).__name__} has no {missing[0]}: give it the methods {', '.join(wanted)} "
            "(mpisjax/nn/network.py says what they do)"
        )
    return cast(MPIS, kind(network))


class _Module:
    """What `MPIS` has beside `init` and `apply`."""

    dropout = 0.0

    def __init__(self, network: Any) -> None:
        self.network = network
        self.temporal: bool = getattr(network, "temporal", False)
        self.dtype: Any = getattr(network, "dtype", None)
        self.initial_rates: Callable[[Array], Any] = network.initial_rates

    def clone(self, **changes: Any) -> Any:
        raise UserError("devices.model_parallel splits the channels of MPIS alone: set it to 1 for your own network")

    def __repr__(self) -> str:
        return repr(self.network)


class _Linen(_Module):
    """A linen module of somebody else's, which may lack running statistics and need not have `__call__`."""

    def init(self, key: Array, images: Array, fire: Fire) -> Variables:
        def touch(module: Any, images: Array) -> Array:
            x = module.encode(images, True)
            rates = module.transition(module.initial_rates(images), x[0] if self.temporal else x, fire, True)
            return module.classify(rates, True)

        return {"batch_stats": {}, **self.network.init(key, images, method=touch)}

    def apply(self, variables: Variables, *args: Any, method: str, mutable: Any = False) -> Any:
        found = self.network.apply(variables, *args, method=method, mutable=mutable)
        return (found[0], {"batch_stats": {}, **found[1]}) if mutable else found


class _NNX(_Module):
    """A module of Flax NNX. It changes as it runs, and what is traced must be pure, so each call merges its own."""

    def __init__(self, network: Any) -> None:
        from flax import nnx

        super().__init__(network)
        parts: Any = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
        self._graph, self._params, self._stats, self._rest = parts
        self._nnx = nnx

    def init(self, key: Array, images: Array, fire: Fire) -> Variables:
        pure = self._nnx.to_pure_dict
        return {"params": pure(self._params), "batch_stats": pure(self._stats)}

    def apply(self, variables: Variables, *args: Any, method: str, mutable: Any = False) -> Any:
        nnx, states = self._nnx, [jax.tree.map(lambda leaf: leaf, state) for state in (self._params, self._stats)]
        for state, name in zip(states, ("params", "batch_stats"), strict=True):
            nnx.replace_by_pure_dict(state, variables.get(name, {}))
        module = nnx.merge(self._graph, *states, self._rest)
        out = getattr(module, method)(*args)
        return (out, {"batch_stats": nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))}) if mutable else out

    def __repr__(self) -> str:
        return f"{type(self.network).__module__}.{type(self.network).__qualname__}"  # without its weights


class _Functions(_Module):
    """Pure functions."""

    def init(self, key: Array, images: Array, fire: Fire) -> Variables:
        return {"batch_stats": {}, **self.network.init(key, images)}

    def apply(self, variables: Variables, *args: Any, method: str, mutable: Any = False) -> Any:
        out, batch_stats = getattr(self.network, method)(variables, *args)
        return (out, {"batch_stats": batch_stats}) if mutable else out
