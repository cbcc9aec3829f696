"""Gives memory back that the C library keeps when XLA has compiled a program.

LLVM takes some hundred MiB in small pieces to compile a training step, and frees them. glibc keeps them for the
process, and XLA's buffers cannot use them, since large blocks are mapped afresh.
"""

from __future__ import annotations

import ctypes
import functools

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LEAST_SECONDS = 0.5  # below, a compilation leaves little, and giving it back takes a few milliseconds


@functools.cache
def trim_after_compiling() -> None:
    """From now on each long compilation of this process is followed by `malloc_trim`; no effect without glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and duration_secs > _LEAST_SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
