"""What a long compilation leaves to the C library goes back to the machine; short ones are not followed by that."""

import json
import platform

import jax
import pytest

from mpisjax.cpu import allocator

PROGRAM = """
import json, jax.monitoring
from mpisjax.cpu import allocator
resident = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
allocator.trim_after_compiling()
pieces = [bytearray(1000) for _ in range(100_000)]
last = bytearray(1000)  # lies behind them, so that their memory does not go back by itself
del pieces
left = [resident()]
for seconds in (0.01, 5.0):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    left.append(resident())
print(json.dumps(left))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has malloc_trim")
def test_what_compiling_leaves_is_given_back(python):
    done = python("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    before, after_a_short_one, after_a_long_one = json.loads(done.stdout)
    assert before - after_a_short_one < 10
    assert before - after_a_long_one > 80


def test_a_program_compiles_under_the_name_that_is_listened_for():
    """JAX's event is no documented name."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
    jax.jit(lambda x: x + 1)(1.0)
    assert allocator._COMPILED in seen
