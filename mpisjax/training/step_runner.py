"""Runs training steps and brings their metrics to the host, waiting no more than the device asks for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import jax

from mpisjax.training import processes
from mpisjax.training.processes import Votes

MAX_IN_FLIGHT = (
    4  # steps an accelerator may lag behind: enough to keep it busy, few enough to stop within seconds
)


class Batches(Protocol):
    """Where batches come from; see `mpisjax.data.Feed`."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""

    def batch(self, step: int) -> Any:
        """The batch of a step (counted from 0), the same whenever it is asked for."""


TrainStep = Callable[[Any, Any], tuple[Any, Any]]


class StepRunner:
    """The steps in flight.

    On a CPU every step is waited for: several host devices can otherwise block one another's all-reduce for
    good. An accelerator is kept a few steps ahead, and metrics are fetched together when somebody asks for
    them.

    Args:
        train_step: Takes (state, batch), gives (state, metrics), metrics being a NamedTuple of scalars.
        feed: The batches.
        state: The state to be trained; its devices decide whether steps are waited for.

    Attributes:
        waits: Whether every step is waited for.
        outvoted: With several processes, whether one of them was asked to stop: the same in all after the same step.
    """

    def __init__(self, train_step: TrainStep, feed: Batches, state: Any) -> None:
        self.outvoted = False
        self._votes = Votes() if processes.count() > 1 else None
        self._counted: deque[Any] = deque()
        self._train_step, self._feed = train_step, feed
        self._flying: deque[Any] = deque()
        self.waits = platform(state) == "cpu"
        self._seconds, self._steps, self._compiled = 0.0, 0, False

    def run(self, state: Any, step: int, stop: bool = False) -> Any:
        """Takes step number `step` (counted from 0); gives the new state, which may not be computed yet.

        Args:
            state: The state.
            step: The step's number.
            stop: With several processes, whether this one was asked to stop.
        """
        began = time.perf_counter()
        state, metrics = self._train_step(state, self._feed.batch(step))
        if self._votes is not None:
            self._counted.append(self._votes.cast(stop))
            if len(self._counted) > (0 if self.waits else MAX_IN_FLIGHT):
                self.outvoted |= int(self._counted.popleft()) > 0
        self._flying.append(metrics)
        if self.waits:
            jax.block_until_ready((state, metrics))
        elif len(self._flying) > MAX_IN_FLIGHT:
            jax.block_until_ready(self._flying[-1 - MAX_IN_FLIGHT])
        if self._compiled:
            self._seconds += time.perf_counter() - began
            self._steps += 1
        else:
            jax.block_until_ready(metrics)  # so that compiling is not counted in the rate
            self._compiled = True
        return state

    def collect(self) -> list[dict[str, float]]:
        """The metrics of the steps since the last call, in order, waiting for those still in flight."""
        began = time.perf_counter()
        rows = [
            {name: float(value) for name, value in metrics._asdict().items()}
            for metrics in jax.device_get(list(self._flying))
        ]
        self._flying.clear()
        self._seconds += time.perf_counter() - began
        return rows

    def rate(self, batch_size: int) -> float | None:
        """Images a second since the last call, of the time spent in steps after the first; None without any."""
        rate = self._steps * batch_size / self._seconds if self._steps and self._seconds > 0 else None
        self._seconds, self._steps = 0.0, 0
        return rate


def platform(tree: Any) -> str:
    """The platform ("cpu", "gpu", "tpu") that holds a pytree's arrays."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()
