"""How many threads share a batch: the same results and bounded memory, up to 64 on whatever cores there are."""

import json
import sys

import jax
import pytest

from mpisjax.cpu import library

needed = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not library.available() or not sys.platform.startswith("linux"),
    reason="no C++ compiler, or no /proc",
)
THREADS = (1, 2, 8, 32, 64)
# XLA's pool has 64 threads here, so that as many take part however few the cores are.
LAYERS = """
import json, os, sys
os.environ["PJRT_NPROC"] = "64"
import jax, jax.numpy as jnp, numpy as np
from benchmarks.resident import peak_mib
from mpisjax import cpu
from mpisjax.cpu import library, winograd
assert cpu.enabled()
draw = lambda *shape: jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)
def compiled(target, out, a, b):
    call = jax.jit(lambda n: jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(out, jnp.float32))(a, b, n))
    return lambda *numbers: np.asarray(call(jnp.asarray((0, *numbers), jnp.int32)))
x, g = draw(70, 16, 16, 32), draw(70, 8, 8, 48)
convolve = compiled(library.CONVOLVE, (70, 8, 8, 48), jnp.where(x > 1, x, 0), draw(3, 3, 32, 48))
filtered = compiled(library.FILTER, (70, 16, 16, 48), x, winograd.kernels(draw(3, 3, 32, 48)))
gradient = compiled(library.KERNEL_GRADIENT, (3, 3, 32, 48), x, g)
found = {}
for threads in map(int, sys.argv[1:]):
    run = lambda: [convolve(threads, 2, 1, 0, 0), filtered(threads), gradient(threads, 2, 0, 0)]
    once, again = run(), run()
    one = once if threads == 1 else one
    found[threads] = {
        "repeated": all(np.array_equal(a, b) for a, b in zip(once, again)),
        "as one": [np.array_equal(a, b) for a, b in zip(once[:2], one[:2])],
        "gradient": float(np.abs(once[2] - one[2]).max() / np.abs(one[2]).max()),
        "MiB": peak_mib(),
    }
pool = int(next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1])
print(json.dumps([pool, found]))
"""


@needed
def test_any_number_of_threads_gives_the_same_layers_in_bounded_memory(python):
    done = python("-c", LAYERS, *THREADS)
    assert done.returncode == 0, done.stderr
    pool, found = json.loads(done.stdout)
    assert pool > 64
    for threads in THREADS:
        one = found[str(threads)]
        assert one["repeated"] and one["as one"] == [True, True], threads
        assert one["gradient"] <= 2e-6, threads  # sums of as many parts, in another order
    # Half a MiB a thread of images and kernels, and 127 sums of the gradient's 54 KiB.
    assert found["64"]["MiB"] - found["1"]["MiB"] < 40


MEMORY = """
import jax, jax.numpy as jnp, numpy as np
from mpisjax import cpu
from mpisjax.cpu import library
assert cpu.enabled()
x, g = jnp.ones((64, 2, 2, 512)), jnp.ones((64, 2, 2, 512))
call = jax.jit(lambda n: jax.ffi.ffi_call(
    library.KERNEL_GRADIENT, jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32))(x, g, n))
numbers = lambda threads: jnp.asarray((0, threads, 1, 1, 1), jnp.int32)
one = np.asarray(call(numbers(1)))
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
many = np.asarray(call(numbers(64)))
np.testing.assert_allclose(many, one, rtol=1e-5)
print((peak() - before) / 1024)
"""


@needed
def test_the_memory_of_a_kernel_gradient_does_not_grow_with_the_threads(python):
    done = python("-c", MEMORY)
    assert done.returncode == 0, done.stderr
    # A gradient has 9 MiB; 64 threads would take 127 parts of it.
    assert float(done.stdout) < 100
