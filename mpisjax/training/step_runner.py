"""Runs training steps and brings their metrics to the host; says what they cost, and traces a few of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpisjax.nn.flops import Counter
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import Adjoint, RateForward
from mpisjax.storage import processes
from mpisjax.storage.processes import Votes

PROFILE_FOLDER = "profile"
SKIPPED, TRACED = 10, 5  # steps of this process before the trace (compiling is over by then), and in it
_log = logging.getLogger(__name__)
MAX_IN_FLIGHT = 4  # steps an accelerator may lag behind: enough to keep it busy, few enough to stop within seconds


TrainStep = Callable[[Any, Any], tuple[Any, Any]]


class StepRunner:
    """The steps in flight.

    On a CPU every step is waited for: several host devices can otherwise block one another's all-reduce for
    good. An accelerator is kept a few steps ahead, and metrics are fetched together when somebody asks for
    them.

    Args:
        train_step: Takes (state, batch), gives (state, metrics), metrics being a NamedTuple of scalars.
        feed: The batches: a `mpisjax.data.Feed`, or what has its `batch`.
        state: The state to be trained; its devices decide whether steps are waited for.

    Attributes:
        waits: Whether every step is waited for.
        outvoted: With several processes, whether one of them was asked to stop: the same in all after the same step.
    """

    def __init__(self, train_step: TrainStep, feed: Any, state: Any) -> None:
        self.outvoted = False
        self._votes = Votes() if processes.count() > 1 else None
        self._counted: deque[Any] = deque()
        self._train_step, self._feed = train_step, feed
        self._flying: deque[Any] = deque()
        self.waits = any(device.platform == "cpu" for leaf in jax.tree.leaves(state) for device in leaf.devices())
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


# Dense peaks of one device as JAX counts devices, by `device_kind`, in TFLOP/s, accumulated in float32: of bfloat16
# products, and of what JAX's default precision makes of float32 products: one bfloat16 pass on a TPU, TF32 on NVIDIA
# from Ampere on. A TPU v2 or v3 chip is two devices. Google Cloud TPU documentation, system architecture; NVIDIA's
# data sheets.
PEAKS = {
    "TPU v2": (22.5, 22.5),
    "TPU v3": (61.5, 61.5),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
    "NVIDIA H100 80GB HBM3": (989.0, 494.0),
    "NVIDIA H200": (989.0, 494.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0),
    "NVIDIA L4": (121.0, 60.0),
}


class Work(NamedTuple):
    """Arithmetic of an interval of steps.

    Attributes:
        tflops: TFLOP/s of convolutions and matrix products, over all devices.
        utilisation: share of the devices' peak; None where the peak is not known.
    """

    tflops: float
    utilisation: float | None


def counted_loops(
    forward: SpikeForward | RateForward,
    adjoint: Adjoint | None,
    *,
    through_time: bool = False,
    penalised: bool = False,
) -> list[str] | None:
    """The metrics that count the turns of a step's loops with convolutions, in order; None where nothing counts them.

    Args:
        forward: How training finds the equilibrium.
        adjoint: How its backward pass is solved; None: as by default.
        through_time: Whether the simulation is differentiated through time instead.
        penalised: Whether the loss has a penalty on the Jacobian.
    """
    if penalised:
        return None
    if through_time:
        return []
    solver = (adjoint or Adjoint()).solver
    loops = ["forward_steps"] if isinstance(forward, RateForward) or forward.tol else []
    if solver == "phantom":
        return loops
    return [*loops, "adjoint_steps"] if solver in ("neumann", "anderson") else None


class Meter:
    """Says how much arithmetic a second the steps of an interval were.

    Args:
        train_step: The `jit`-compiled step.
        shapes: Shapes of its arguments.
        mesh: The devices it runs on.
        loops: What `counted_loops` gave.
        batch_size: Examples a step.
        dtype: Of the network's products.
    """

    def __init__(
        self,
        train_step: Any,
        shapes: tuple[Any, ...],
        mesh: jax.sharding.Mesh,
        *,
        loops: list[str] | None,
        batch_size: int,
        dtype: str = "float32",
    ) -> None:
        self._loops, self._batch_size, self._dtype = loops, batch_size, dtype
        self._trace: Callable[[], Any] = lambda: train_step.trace(*shapes).jaxpr
        self._jaxpr: Any = None
        self._devices, self._kind = mesh.size, mesh.devices.flat[0].device_kind

    def __call__(self, means: Mapping[str, float | None], images_per_second: float | None) -> Work | None:
        """The arithmetic of an interval with these mean metrics; None where it cannot be told.

        The count is nominal: what an algorithm saves or a compiler recomputes changes the time and not the count.
        """
        if self._loops is None or images_per_second is None:
            return None
        known = [turn for name in self._loops if (turn := means.get(name)) is not None]
        if len(known) < len(self._loops):
            return None
        try:
            if self._jaxpr is None:
                self._jaxpr = self._trace()
            operations = Counter(known).count(getattr(self._jaxpr, "jaxpr", self._jaxpr))
        except ValueError:  # a loop whose turns nobody counts
            self._loops = None
            return None
        tflops = operations * images_per_second / self._batch_size / 1e12
        if self._kind not in PEAKS:
            return Work(tflops, None)
        bfloat16, float32 = PEAKS[self._kind]
        return Work(tflops, tflops / ((bfloat16 if self._dtype == "bfloat16" else float32) * self._devices))


class Tracer:
    """Traces a few steps into a folder, for TensorBoard or Perfetto.

    Args:
        folder: Where to; None traces nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._taken, self._running = folder, 0, False

    def before_step(self, state: Any) -> None:
        """To be called before each step, with the state it starts from."""
        if self._folder is not None and self._taken == SKIPPED:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if self._running and self._taken == SKIPPED + TRACED:
            self.close(state)
        self._taken += 1

    def close(self, state: Any = None) -> None:
        """Ends the trace, if one is running."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            _log.info(
                "traced %d steps into %s: tensorboard --logdir there (with its profile plugin), or Perfetto",
                min(self._taken - SKIPPED, TRACED),
                self._folder,
            )
