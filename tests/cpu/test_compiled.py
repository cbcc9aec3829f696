"""The compiled convolutions against NumPy's and XLA's in float64, and what happens where they cannot be had."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisjax import cpu
from mpisjax.cpu import compiled, library, winograd
from mpisjax.nn import convolution

pytestmark = pytest.mark.unoptimized
compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
wanted = os.environ.get("MPISJAX_CPU", "1") != "0" and jax.default_backend() == "cpu"
needed = pytest.mark.skipif(not (compiler and wanted), reason="no C++ compiler, or not wanted")


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def thinned(a, density, seed):
    """Zeros but for so large a part, image by image another one: some go by what is active, some by tiles."""
    rng = np.random.default_rng(seed)
    part = np.clip(density * rng.uniform(0.5, 1.5, (len(a), *[1] * (a.ndim - 1))), 0, 1)
    return np.where(rng.random(a.shape) < part, a, 0)


def taps(x, kernel, stride):
    """A view of the padded float64 x and, for every place of the kernel, of what it meets there: no shape compiles."""
    low, high = zip(*(convolution.same_padding(n, kernel, stride) for n in x.shape[1:3]), strict=True)
    padded = np.pad(x, ((0, 0), *zip(low, high, strict=True), (0, 0)))
    rows, columns = (stride * -(-n // stride) for n in x.shape[1:3])
    places = np.ndindex(kernel, kernel)
    inner = padded[:, low[0] : low[0] + x.shape[1], low[1] : low[1] + x.shape[2]]
    return inner, {(i, j): padded[:, i : i + rows : stride, j : j + columns : stride] for i, j in places}


def in_float64(x, w, stride):
    return sum(seen @ w[place] for place, seen in taps(x, len(w), stride)[1].items())


def kernel_gradient_in_float64(x, g, kernel, stride):
    seen = taps(x, kernel, stride)[1].values()
    return np.stack([np.einsum("bhwi,bhwo->io", a, g, optimize=True) for a in seen]).reshape(
        kernel, kernel, -1, g.shape[-1]
    )


def transpose_in_float64(g, w, stride, size):
    inner, seen = taps(np.zeros((len(g), *size, w.shape[2])), len(w), stride)
    for place, into in seen.items():
        into += g @ w[place].T
    return inner


def conv(x, w, stride):
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def far(found, exact):
    """The largest difference, relative to the exact values' size."""
    return np.abs(np.asarray(found, np.float64) - exact).max() / max(np.abs(exact).max(), 1e-30)


def custom_calls(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile().as_text().count('custom_call_target="mpisjax')


@needed
@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3),
    density=st.sampled_from([0, 0.02, 0.2, 0.5, 1]),
    size=st.tuples(st.integers(1, 17), st.one_of(st.integers(1, 17), st.sampled_from([28, 32]))),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.sampled_from([1, 2, 4]),
    channels=st.tuples(
        st.sampled_from([1, 2, 3, 7, 16, 24, 31, 48, 64, 80, 128]),
        st.sampled_from([8, 15, 16, 24, 32, 33, 48, 64, 80, 112]),
    ),
    seed=st.integers(0, 99),
)
def test_convolution_and_its_gradients_are_those_of_float64(batch, density, size, kernel, stride, channels, seed):
    ins, outs = channels
    w = drawn(seed + 1, kernel, kernel, ins, outs)
    small = tuple(-(-n // stride) for n in size)
    x = thinned(drawn(seed, batch, *size, ins), density, seed)
    g = thinned(drawn(seed + 2, batch, *small, outs), density, seed)
    low = tuple(convolution.same_padding(n, kernel, stride)[0] for n in size)
    x32, w32, g32 = (jnp.asarray(a, jnp.float32) for a in (x, w, g))
    assert cpu.enabled() and compiled.serves(x32.dtype, [outs])

    assert far(compiled.convolve(x32, w32, stride, 1, low, small), in_float64(x, w, stride)) < 1e-5
    gradient = kernel_gradient_in_float64(x, g, kernel, stride)
    assert far(compiled.kernel_gradient(x32, g32, (kernel, kernel), stride, low), gradient) < 1e-5
    flipped = jnp.asarray(w[::-1, ::-1].swapaxes(2, 3), jnp.float32)
    reach = tuple(kernel - 1 - n for n in low)
    exact = transpose_in_float64(g, w, stride, size)
    assert far(compiled.convolve(g32, flipped, 1, stride, reach, size), exact) < 1e-5


@needed
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.0, 1e-30])
def test_a_single_active_place_is_seen_whatever_its_value(value):
    x = np.zeros((1, 9, 9, 16), np.float32)
    x[0, 4, 4, 3] = value
    w = jnp.asarray(drawn(0, 3, 3, 16, 32), jnp.float32)
    found = np.asarray(compiled.convolve(jnp.asarray(x), w, 1, 1, (1, 1), (9, 9)))[0]
    expected = np.zeros((9, 9, 32), np.float32)
    expected[3:6, 3:6] = np.asarray(w)[::-1, ::-1, 3] * np.float32(value)
    np.testing.assert_array_equal(found, expected)


@needed
def test_an_image_goes_the_same_way_in_any_company():
    x = thinned(drawn(0, 6, 14, 14, 32), 0.5, 1).astype(np.float32)
    w = jnp.asarray(drawn(1, 3, 3, 32, 48), jnp.float32)
    together = compiled.convolve(jnp.asarray(x), w, 2, 1, (0, 0), (7, 7))
    alone = [compiled.convolve(jnp.asarray(one[None]), w, 2, 1, (0, 0), (7, 7)) for one in x]
    np.testing.assert_array_equal(np.asarray(together), np.concatenate(alone))


@needed
@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 33), st.one_of(st.integers(1, 33), st.sampled_from([64]))),
    kernel=st.sampled_from([3, 5]),
    channels=st.tuples(st.sampled_from([16, 33, 48, 64, 256]), st.sampled_from([16, 40, 48, 64, 80])),
    seed=st.integers(0, 99),
)
def test_filtering_is_the_convolution_of_float64(batch, size, kernel, channels, seed):
    x, w = drawn(seed, batch, *size, channels[0]), drawn(seed + 1, kernel, kernel, *channels)
    kernels = winograd.kernels(jnp.asarray(w, jnp.float32))
    found = compiled.filtered(jnp.asarray(x, jnp.float32), kernels)
    # Its rounding is up to three times that of a plain sum, and grows with the channels.
    assert far(found, in_float64(x, w, 1)) < 5e-5


def losses(stride, size):
    """A smooth loss of x, w and g with the convolutions of a network, and the same with XLA's."""

    def ours(x, w, g):
        there, back = convolution.conv2d(x, w, stride), convolution.conv_transpose2d(g, w, stride, size)
        return jnp.sum(jnp.sin(there)) + jnp.sum(jnp.sin(back))

    def plain(x, w, g):
        back = jax.vjp(lambda x: conv(x, w, stride), jnp.zeros_like(x))[1](g)[0]
        return jnp.sum(jnp.sin(conv(x, w, stride))) + jnp.sum(jnp.sin(back))

    return ours, plain


def product(loss):
    return lambda *arrays: jax.jvp(jax.grad(loss, (0, 1, 2)), arrays, arrays)[1]


@needed
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transform", [lambda f: jax.grad(f, (0, 1, 2)), product], ids=["gradient", "Hessian product"])
def test_derivatives_of_both_orders_and_directions(stride, transform):
    x, w = drawn(0, 2, 7, 7, 16), drawn(1, 3, 3, 16, 32) / 10
    g = drawn(2, 2, *(-(-7 // stride),) * 2, 32)
    ours, plain = losses(stride, (7, 7))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w, g)]
    found = jax.jit(transform(ours)).lower(*arrays).compile()
    assert " convolution(" not in found.as_text() and "mpisjax_" in found.as_text()
    with jax.enable_x64(True):
        exact = jax.jit(transform(plain))(*(jnp.asarray(a) for a in (x, w, g)))
        exact = [np.asarray(a) for a in exact]
    for one, other in zip(found(*arrays), exact, strict=True):
        assert far(one, other) < 1e-4


@needed
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_over_any_arguments(stride, axes):
    x, w = drawn(0, 3, 2, 5, 5, 16), drawn(1, 3, 3, 3, 16, 16) / 10
    g = drawn(2, 3, 2, *(-(-5 // stride),) * 2, 16)
    arrays = [jnp.asarray(a if n == 0 else a[0], jnp.float32) for a, n in zip((x, w, g), axes, strict=True)]
    gradient = jax.grad(losses(stride, (5, 5))[0], (0, 1, 2))
    found = jax.jit(jax.vmap(gradient, axes)).lower(*arrays).compile()
    assert 'custom_call_target="mpisjax' in found.as_text()
    found, alone = found(*arrays), jax.jit(gradient)
    for i in range(3):
        one = alone(*(a[i] if n == 0 else a for a, n in zip(arrays, axes, strict=True)))
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@needed
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_the_ops_of_a_network_use_it_on_a_cpu_and_not_when_told(name):
    x, w = jnp.asarray(drawn(0, 2, 14, 14, 32), jnp.float32), jnp.asarray(drawn(1, 3, 3, 32, 48), jnp.float32)
    g = jnp.asarray(drawn(2, 2, 7, 7, 48), jnp.float32)

    def conv(x, w):
        return jnp.sum(convolution.conv2d(x, w, 2) ** 2)

    def transposed(g, w):
        return jnp.sum(convolution.conv_transpose2d(g, w, 2, (14, 14)) ** 2)

    loss, a = (conv, x) if name == "conv2d" else (transposed, g)

    # The same function under jit within and without: one must not get the other's program.
    both = jax.jit(jax.grad(loss, (0, 1)))
    ours = both(a, w)
    assert custom_calls(jax.grad(loss, (0, 1)), a, w) == 3
    with cpu.disabled():
        plain = both(a, w)
        assert both.lower(a, w).compile().as_text().count('custom_call_target="mpisjax') == 0
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@needed
@pytest.mark.parametrize(
    ("x", "w", "served"),
    [
        (jnp.zeros((1, 8, 8, 32)), (3, 3, 32, 48), True),
        (jnp.zeros((1, 8, 8, 32), jnp.bfloat16), (3, 3, 32, 48), False),
        (jnp.zeros((0, 8, 8, 32)), (3, 3, 32, 48), False),
        (
            jnp.zeros((1, 8, 8, 48)),
            (3, 3, 48, 3),
            False,
        ),  # of 16 channels that are computed, 13 would be for nothing
    ],
    ids=["wide", "bfloat16", "no sample", "narrow"],
)
def test_what_it_does_not_serve_is_left_to_xla(x, w, served):
    text = jax.jit(lambda x, w: convolution.conv2d(x, w, 2)).lower(x, jnp.zeros(w, x.dtype)).as_text()
    assert ("mpisjax_convolve" in text) == served


@needed
@pytest.mark.parametrize(
    ("target", "shapes", "numbers", "out", "said"),
    [
        (library.CONVOLVE, ((1, 4, 4), (3, 3, 8, 8)), 6, (1, 4, 4, 8), "four axes"),
        (library.CONVOLVE, ((1, 4, 4, 8), (3, 3, 8, 8)), 3, (1, 4, 4, 8), "six numbers"),
        (library.CONVOLVE, ((2, 4, 4, 8), (3, 3, 8, 8)), 6, (1, 4, 4, 8), "batches differ"),
        (library.CONVOLVE, ((1, 4, 4, 8), (3, 3, 16, 8)), 6, (1, 4, 4, 8), "differ in channels"),
        (library.CONVOLVE, ((1, 4, 4, 8), (3, 3, 8, 8)), 6, (1, 4, 4, 9), "differ in channels"),
        (library.KERNEL_GRADIENT, ((1, 4, 4, 8), (1, 4, 4, 8)), 5, (3, 3, 9, 8), "differ in channels"),
        (library.KERNEL_GRADIENT, ((1, 4, 4, 8), (2, 4, 4, 8)), 5, (3, 3, 8, 8), "batches differ"),
        (library.KERNEL_GRADIENT, ((1, 4, 4, 8), (4, 4, 8)), 5, (3, 3, 8, 8), "four axes"),
        (library.FILTER, ((1, 4, 4, 16), (35, 16, 16)), 2, (1, 4, 4, 16), "36 or 64"),
        (library.FILTER, ((1, 4, 4, 16), (36, 16, 16)), 2, (1, 4, 5, 16), "differ in size"),
        (library.FILTER, ((1, 4, 4, 8), (36, 8, 16)), 2, (1, 4, 4, 16), "multiples of 16"),
    ],
    ids=str,
)
def test_buffers_that_do_not_fit_are_an_error(target, shapes, numbers, out, said):
    assert cpu.enabled()
    arrays = [*(jnp.ones(s) for s in shapes), jnp.ones(numbers, jnp.int32)]
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(out, jnp.float32))(*arrays))


@needed
def test_wrong_numbers_are_an_error():
    assert cpu.enabled()
    x, w = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 8))
    for numbers, said in (
        ((0, 1, 0, 1, 1, 1), "stride"),
        ((0, 1, 2, 2, 1, 1), "stride"),
        ((0, 1, 1, 1, -1, 1), "padding"),
        ((0, 1, 1, 1, 1, 9), "padding"),
    ):
        call = jax.ffi.ffi_call(library.CONVOLVE, jax.ShapeDtypeStruct(x.shape, x.dtype))
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            jax.block_until_ready(call(x, w, jnp.asarray(numbers, jnp.int32)))


@needed
def test_no_memory_is_an_error_also_in_a_thread_of_the_pool(python):
    program = """
import resource, jax, jax.numpy as jnp
from mpisjax import cpu
from mpisjax.cpu import library
assert cpu.enabled()
x, g = jnp.ones((8, 4000, 4000, 1)), jnp.ones((8, 2, 2, 8))
call = jax.jit(lambda n: jax.ffi.ffi_call(
    library.KERNEL_GRADIENT, jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.float32))(x, g, n))
numbers = lambda threads: jnp.asarray((0, threads, 1, 0, 0), jnp.int32)
run = call.lower(numbers(1)).compile()
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, -1))  # an image takes 977 MiB with its channels padded
for threads in (1, 4):
    try:
        jax.block_until_ready(run(numbers(threads)))
    except jax.errors.JaxRuntimeError as error:
        assert "found no memory" in str(error), error
    else:
        raise SystemExit("no error")
print("both told")
"""
    done = python("-c", program)
    assert done.stdout == "both told\n", done.stderr


PROGRAM = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
import jax, jax.numpy as jnp
from mpisjax import cpu
from mpisjax.cpu import winograd
from mpisjax.nn import convolution
x = jnp.ones((2, 9, 9, 16)); w = jnp.ones((3, 3, 16, 16))
print(cpu.enabled(), float(jax.jit(convolution.conv2d)(x, w).sum()))
"""
SUM = 2 * 16 * 16 * (7 * 7 * 9 + 4 * 7 * 6 + 4 * 4)


def printed(tmp_path, **variables):
    """What PROGRAM prints with a cache of its own, where the library is compiled in a third of the time."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "MPISJAX_CPU_FLAGS": "-O0"} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split(), [line for line in done.stderr.splitlines() if "convolutions" in line]


@needed
def test_without_a_compiler_or_when_switched_off_or_with_a_broken_one_xla_serves(tmp_path):
    assert printed(tmp_path, MPISJAX_CPU="0") == (["False", str(float(SUM))], [])
    empty = tmp_path / "bin"
    empty.mkdir()
    assert printed(tmp_path, PATH=str(empty), CXX="") == (["False", str(float(SUM))], [])
    broken = empty / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such language' >&2\nexit 1\n")
    broken.chmod(0o755)
    told, warned = printed(tmp_path, PATH=f"{empty}{os.pathsep}{os.environ['PATH']}", CXX="")
    assert told == ["False", str(float(SUM))]
    assert len(warned) == 1 and "no such language" in warned[0] and "MPISJAX_CPU=0" in warned[0]


@needed
def test_it_is_compiled_once_not_loaded_where_others_may_write_and_compiled_again_when_damaged(tmp_path):
    assert printed(tmp_path) == (["True", str(float(SUM))], [])
    (library,) = (tmp_path / "mpisjax" / "cpu").iterdir()
    written = library.stat().st_mtime_ns
    for path in (library, library.parent):
        mode = path.stat().st_mode
        assert not mode & 0o077
        path.chmod(0o777)
        told, warned = printed(tmp_path)
        assert told == ["False", str(float(SUM))]
        assert len(warned) == 1 and f"others may write {path}: run `chmod go-w {path}`" in warned[0]
        path.chmod(mode)
    assert printed(tmp_path) == (["True", str(float(SUM))], [])
    assert library.stat().st_mtime_ns == written
    library.write_bytes(b"not a library")
    assert printed(tmp_path) == (["True", str(float(SUM))], [])


def test_importing_compiles_nothing_and_leaves_the_cache_alone(tmp_path, python):
    program = "import mpisjax, mpisjax.nn, mpisjax.training.run, mpisjax.cpu.forms"
    done = python("-c", program, XDG_CACHE_HOME=str(tmp_path), CXX="/no/compiler")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*cpu*")) and not list(tmp_path.rglob("*.so"))


@needed
def test_devices_share_a_batch_and_add_up_their_gradients():
    program = """
import jax; jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mpisjax.cpu import winograd
from mpisjax.nn import convolution
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
r = np.random.default_rng(0)
x, w = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((4, 8, 8, 16), (3, 3, 16, 32)))
def loss(x, w):  # in a loop, as a solve is
    y = jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(convolution.conv2d(x, w, 2) + y), jnp.zeros((4, 4, 4, 32)))
    return jnp.sum(y * convolution.conv2d(x, w, 2))
step = jax.jit(jax.value_and_grad(loss, 1))
alone = step(x, w)
shared = (jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(w, NamedSharding(mesh, P())))
together = step(*shared)
text = step.lower(*shared).compile().as_text()
assert "f32[2,4,4,32]{3,2,1,0} custom-call" in text and "all-gather" not in text, text
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."}, check=True)


CACHED = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
from mpisjax.training import devices
devices.compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[1]))
import jax.numpy as jnp, numpy as np
from mpisjax import cpu
from mpisjax.cpu import compiled
from mpisjax.nn import convolution
x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 16)), jnp.float32)
w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 16, 16)), jnp.float32)
assert cpu.enabled()
mesh = devices.data_mesh(4)
x, w = jax.device_put(x, devices.batch_sharding(mesh)), jax.device_put(w, devices.replicated(mesh))
events.clear()
# The same shapes throughout: nothing but the numbers tells one convolution from the other.
for low in ((0, 0), (1, 1), (2, 2)):
    y = jax.jit(lambda x, w: compiled.convolve(x, w, 1, 1, low, (8, 8)))(x, w)
    found = {"hits": events.count("cache_hits"), "misses": events.count("cache_misses")}
    padded = jnp.pad(x, ((0, 0), (low[0], 2), (low[1], 2), (0, 0)))
    exact = jax.lax.conv_general_dilated(padded, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(y, exact[:, :8, :8], atol=1e-4)
    print(found["hits"], found["misses"])
    events.clear()
"""


@needed
def test_the_compilation_cache_knows_one_convolution_from_another(tmp_path):
    environment = os.environ | {"PYTHONPATH": "."}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for expected in ("0 1", "1 0"):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [expected] * 3
