"""Wall-clock and processor time of a call, and the time and memory that its compilation takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Times of one call, in seconds; `cpu` counts every thread of the process.

    Attributes:
        seconds: Wall-clock time, median.
        fastest: Wall-clock time, minimum.
        cpu: Processor time, median.
        repeats: Calls timed.
    """

    seconds: float
    fastest: float
    cpu: float
    repeats: int


def measure(
    call: Callable[..., Any],
    prepare: Callable[[], tuple[Any, ...]] = tuple,
    *,
    repeats: int = 10,
    budget: float = float("inf"),
    least: int = 3,
) -> Timing:
    """Times `call(*prepare())`, each call waited for, after one call to warm up.

    Args:
        call: What to time; may return JAX arrays.
        prepare: Makes the arguments anew for every call (for donated buffers), outside the timed region.
        repeats: The most calls to time.
        budget: Seconds after which no further call is begun.
        least: The fewest calls to time, whatever the budget.
    """
    jax.block_until_ready(call(*prepare()))
    wall: list[float] = []
    cpu: list[float] = []
    began = time.perf_counter()
    while len(wall) < repeats and (len(wall) < least or time.perf_counter() - began < budget):
        arguments = jax.block_until_ready(prepare())
        w, c = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(*arguments))
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return Timing(statistics.median(wall), min(wall), statistics.median(cpu), len(wall))


class Compiled(NamedTuple):
    """A compiled function, and what making it cost.

    Attributes:
        call: The function.
        trace_seconds: Time of tracing and lowering.
        compile_seconds: Time of XLA's compilation.
        temporary: Bytes a device needs beside arguments and results.
        arguments: Bytes of arguments on a device.
    """

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    temporary: int
    arguments: int


def compiled(jitted: Any, *arguments: Any) -> Compiled:
    """Compiles a `jax.jit` function ahead of time for arguments (or their shapes), past any cache."""
    began = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter() - began
    with _past_the_cache():
        return _finished(lowered, traced)


def compiled_together(functions: Sequence[tuple[Any, tuple[Any, ...]]]) -> list[Compiled]:
    """As `compiled` of each (function, arguments), several at once: their compile times then mean little."""
    with _past_the_cache(), ThreadPoolExecutor() as pool:
        waiting = []
        for jitted, arguments in functions:
            began = time.perf_counter()
            lowered = jitted.lower(*arguments)
            waiting.append(pool.submit(_finished, lowered, time.perf_counter() - began))
        return [one.result() for one in waiting]


def _finished(lowered: Any, traced: float) -> Compiled:
    began = time.perf_counter()
    done = lowered.compile()
    ended = time.perf_counter()
    memory = done.memory_analysis()
    temporary, arguments = int(memory.temp_size_in_bytes), int(memory.argument_size_in_bytes)
    return Compiled(done, traced, ended - began, temporary, arguments)


@contextlib.contextmanager
def _past_the_cache() -> Iterator[None]:
    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009 (made at run time)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
