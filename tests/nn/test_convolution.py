"""Convolutions and upsampling against loops in NumPy: values and both gradients, odd and even sizes."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax import cpu
from mpisjax.hoisting import hoist
from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved, upsample

pytestmark = pytest.mark.unoptimized


def places(size, kernel, stride, offset):
    """(output positions, input positions) that a kernel entry joins, with "same" padding."""
    out = -(-size // stride)
    low = max((out - 1) * stride + kernel - size, 0) // 2
    o = np.arange(out)
    i = o * stride + offset - low
    inside = (i >= 0) & (i < size)
    return o[inside], i[inside]


def each_entry(size, kernel, stride):
    for a in range(kernel):
        for b in range(kernel):
            (oy, iy), (ox, ix) = places(size[0], kernel, stride, a), places(size[1], kernel, stride, b)
            yield (a, b), np.ix_(oy, ox), np.ix_(iy, ix)


def np_conv(x, w, stride):
    size = x.shape[1:3]
    out = np.zeros((len(x), *(-(-n // stride) for n in size), w.shape[3]))
    for ab, (oy, ox), (iy, ix) in each_entry(size, w.shape[0], stride):
        out[:, oy, ox] += x[:, iy, ix] @ w[ab]
    return out


def np_input_gradient(g, w, stride, size):
    out = np.zeros((len(g), *size, w.shape[2]))
    for ab, (oy, ox), (iy, ix) in each_entry(size, w.shape[0], stride):
        out[:, iy, ix] += g[:, oy, ox] @ w[ab].T
    return out


def np_kernel_gradient(x, g, kernel, stride):
    out = np.zeros((kernel, kernel, x.shape[3], g.shape[3]))
    for ab, (oy, ox), (iy, ix) in each_entry(x.shape[1:3], kernel, stride):
        out[ab] = np.einsum("byxi,byxo->io", x[:, iy, ix], g[:, oy, ox])
    return out


def check_both_convolutions(kernel, stride, size, channels, batch=2):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(batch, *size, channels[0])), rng.normal(size=(kernel, kernel, *channels))
    y = rng.normal(size=(batch, *(halved(n) if stride == 2 else n for n in size), channels[1]))

    @jax.jit
    def run(x, w, y):
        forward, pull = jax.vjp(lambda x, w: conv2d(x, w, stride), x, w)
        # y meets the transposed convolution; its own kernel is laid out [k, k, out, in].
        back, pull_back = jax.vjp(lambda y, w: conv_transpose2d(y, w, stride, size), y, w)
        # A second derivative of sorts: solvers on the normal equations transpose the transpose.
        dual = jax.linear_transpose(lambda g: pull(g)[0], y)(x)[0]
        return forward, pull(y), back, pull_back(x), dual

    forward, (dx, dw), back, (dy, dw_back), dual = run(x, w, y)
    close = functools.partial(np.testing.assert_allclose, atol=1e-10 if max(channels) > 4 else 1e-12)
    close(forward, np_conv(x, w, stride))
    close(dx, np_input_gradient(y, w, stride, size))
    close(dw, np_kernel_gradient(x, y, kernel, stride))
    close(back, dx)
    close(dy, forward)
    close(dw_back, dw)
    close(dual, forward)


@pytest.mark.parametrize("size", [(5, 6), (7, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_their_transposes_and_all_gradients(x64, kernel, stride, size):
    check_both_convolutions(kernel, stride, size, (3, 4))


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "channels", "batch"),
    [
        (3, 1, (8, 7), (32, 33), 3),  # by minimal filtering on a CPU
        (5, 1, (4, 11), (17, 16), 6),
        (3, 2, (15, 18), (3, 4), 2),  # by phases
        (5, 2, (16, 15), (3, 2), 1),
    ],
    ids=str,
)
def test_the_forms_that_a_cpu_takes_compute_the_same(x64, kernel, stride, size, channels, batch):
    check_both_convolutions(kernel, stride, size, channels, batch)


@pytest.mark.parametrize("stride", [1, 2])
def test_each_platform_gets_its_own_form(stride):
    x, w, y = (
        jnp.zeros((2, 16, 16, 32)),
        jnp.zeros((3, 3, 32, 32)),
        jnp.zeros((2, 16 // stride, 16 // stride, 32)),
    )

    def text(platform):
        with cpu.disabled():  # XLA's own forms
            return lowered(platform)

    def lowered(platform):
        traced = jax.jit(lambda x, w, y: jax.vjp(lambda x: conv2d(x, w, stride), x)[1](y)).trace(x, w, y)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    own, others = text("cpu"), {text("cuda"), text("tpu")}
    for other in others:
        assert other.count("stablehlo.convolution") == 1
    assert own.count("stablehlo.convolution") == (0 if stride == 1 else 4)
    assert ("stablehlo.dot_general" in own) == (stride == 1)
    assert "mpisjax" not in own
    if cpu.enabled():
        compiled = lowered("cpu")
        assert compiled.count("stablehlo.convolution") == 0
        assert ("mpisjax_filter" in compiled) == (stride == 1)
        assert ("mpisjax_convolve" in compiled) == (stride == 2)
        assert "mpisjax" not in lowered("cuda")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU's fast path")
@pytest.mark.parametrize("layer", [conv2d, lambda x, w, s: conv_transpose2d(x, w, s, (2 * x.shape[1],) * 2)])
def test_gradients_inside_a_loop_keep_the_layout_of_the_fast_path(layer):
    """XLA folds what surrounds a convolution into it; in other layouts it took 60 times as long (dw)."""
    w = jnp.ones((3, 3, 8, 8))

    def through_time(x, w):
        return jax.lax.scan(lambda c, _: (c + jnp.sum(layer(x + c, w, 2) ** 2), None), 0.0, None, length=5)[0]

    with cpu.disabled():
        compiled = jax.jit(jax.grad(through_time, (0, 1))).lower(jnp.ones((4, 14, 14, 8)), w).compile()
    labels = set(re.findall(r"dim_labels=(\S+?)[,\s]", compiled.as_text()))
    assert labels == {"b01f_01io->b01f"}


def test_a_convolution_is_the_librarys_with_same_padding():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 6, 7, 2)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 2, 2)), jnp.float32)
    expected = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(conv2d(x, w, 2), expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "size"), [(1, (2, 3)), (2, (4, 5)), (2, (3, 6)), (4, (5, 12))], ids=str)
def test_upsampling_repeats_and_crops_and_its_transpose_sums(x64, factor, size):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 3, 2)), rng.normal(size=(2, *size, 2))
    out, pull = jax.vjp(lambda x: upsample(x, factor, size), jnp.asarray(x))
    rows, columns = np.arange(size[0]) // factor, np.arange(size[1]) // factor
    np.testing.assert_array_equal(out, x[:, rows[:, None], columns])
    expected = np.zeros_like(x)
    np.add.at(expected, (slice(None), rows[:, None], columns), g)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], expected, atol=1e-12)


def test_upsampling_does_not_differentiate_into_a_scatter():
    text = str(jax.make_jaxpr(jax.grad(lambda x: upsample(x, 2, (5, 5)).sum()))(jnp.zeros((1, 3, 3, 1))))
    assert "scatter" not in text


def test_sizes_after_halvings():
    assert [halved(28, t) for t in range(6)] == [28, 14, 7, 4, 2, 1]
    assert [halved(7, t) for t in range(4)] == [7, 4, 2, 1]
    for size in range(1, 40):  # once four times over is four times once
        assert halved(halved(size), 1) == halved(size, 2)


def test_a_wide_convolution_can_be_exported_for_any_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 8, 8, 32), jnp.float32)
    w = jnp.ones((3, 3, 32, 32))
    program = jax.export.export(jax.jit(conv2d), platforms=("cpu", "tpu"))(x, w)
    np.testing.assert_allclose(program.call(jnp.ones((3, 8, 8, 32)), w)[:, 4, 4], 9 * 32)


def library(x, w, stride):
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def library_transposed(g, w, stride, size):
    x = jax.ShapeDtypeStruct((g.shape[0], *size, w.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: library(x, w, stride), x)(g)[0]


def both_ways(convolve, transposed, stride, size):
    """A loss of x, w and g that is smooth, and not linear in any of them."""
    return lambda x, w, g: jnp.sum(jnp.sin(convolve(x, w, stride))) + jnp.sum(jnp.sin(transposed(g, w, stride, size)))


def drawn_for(stride, size, kernel=3, channels=(2, 3), batch=2, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    small = [-(-n // stride) for n in size]
    shapes = (batch, *size, channels[0]), (kernel, kernel, *channels), (batch, *small, channels[1])
    return [jnp.asarray(rng.normal(size=s) / kernel, dtype) for s in shapes]


@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        jax.jacfwd,
        jax.hessian,  # forward over reverse
        lambda f, argnums: jax.jacrev(jax.jacfwd(f, argnums), argnums),
        lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums),
    ],
    ids=["grad", "jacfwd", "hessian", "jacrev of jacfwd", "jacrev of jacrev"],
)
@pytest.mark.parametrize(
    ("stride", "size", "kernel", "channels"),
    [
        (1, (5, 4), 3, (2, 3)),
        (2, (5, 4), 3, (2, 3)),
        (1, (4, 7), 5, (1, 2)),
        (2, (4, 7), 5, (1, 2)),
        (2, (16, 15), 3, (1, 1)),  # by phases on a CPU
        (1, (4, 4), 3, (32, 1)),
    ],
    ids=str,
)
def test_derivatives_of_both_orders_and_directions(x64, transform, stride, size, kernel, channels):
    arrays = drawn_for(stride, size, kernel, channels, batch=1)
    argnums = (0, 1, 2) if max(size) < 15 and max(channels) < 32 else (1,)
    ours, exact = (
        jax.jit(transform(both_ways(*fns, stride, size), argnums))(*arrays)
        for fns in ((conv2d, conv_transpose2d), (library, library_transposed))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def hessian_product(loss):
    return lambda *arrays: jax.jvp(jax.grad(loss, (0, 1, 2)), arrays, arrays)[1]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, None), (0, 0, 0)], ids=str)
def test_vmap_over_any_arguments(x64, stride, axes):
    size = (5, 6)
    arrays = [
        a if axis is None else jnp.stack([a, -2 * a, a**2])
        for a, axis in zip(drawn_for(stride, size), axes, strict=True)
    ]
    loss = both_ways(conv2d, conv_transpose2d, stride, size)
    for fn in (jax.grad(loss, (0, 1, 2)), hessian_product(loss)):
        each = [fn(*(a if n is None else a[i] for a, n in zip(arrays, axes, strict=True))) for i in range(3)]
        expected = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
        for a, b in zip(jax.jit(jax.vmap(fn, axes))(*arrays), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_vmap_within_vmap_and_over_another_axis(x64):
    x, w, g = drawn_for(2, (5, 6))
    xs, ws = jnp.stack([x, -x, x**2], 2), jnp.stack([w, w**2], 3)
    gradient = jax.grad(both_ways(conv2d, conv_transpose2d, 2, (5, 6)), (0, 1))
    found = jax.vmap(jax.vmap(gradient, (2, None, None)), (None, 3, None))(xs, ws, g)
    for i, j in np.ndindex(2, 3):
        for a, b in zip(found, gradient(xs[:, :, j], ws[:, :, :, i], g), strict=True):
            np.testing.assert_allclose(a[i, j], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_derivatives_of_loops_and_within_them(x64, stride):
    size = (5, 6)
    ours = both_ways(conv2d, conv_transpose2d, stride, size)
    theirs = both_ways(library, library_transposed, stride, size)
    arrays = drawn_for(stride, size)

    def scanned(loss):
        def total(x, w, g):
            step = jax.checkpoint(lambda c, _: (loss(x + c, w, g - c) / 10, None))
            return jax.lax.scan(step, 0.0, None, length=3)[0]

        return total

    def descended(loss):  # a gradient within a loop, differentiated in forward mode
        def end(x, w, g):
            step = lambda s: (s[0] + 1, s[1] - 0.1 * jax.grad(loss)(s[1], w, g))  # noqa: E731
            return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

        return lambda *arrays: jax.jvp(end, arrays, arrays)

    for make in (
        lambda loss: jax.grad(scanned(loss), (0, 1, 2)),
        lambda loss: hessian_product(scanned(loss)),
        descended,
    ):
        found, exact = (jax.jit(make(loss))(*arrays) for loss in (ours, theirs))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@contextlib.contextmanager
def debugging():
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.checking_leaks(), jax.debug_nans(True), strict[0], strict[1]:
        yield


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("switch", [debugging, jax.disable_jit])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_users_debugging_switches(switch, stride):
    arrays = drawn_for(stride, (16, 16), channels=(16, 32), dtype=jnp.float32)
    product = hessian_product(both_ways(conv2d, conv_transpose2d, stride, (16, 16)))
    expected = jax.jit(product)(*arrays)
    jax.clear_caches()  # to trace again
    with switch():
        found = [jax.jit(product)(*arrays), product(*arrays)]
    for one in found:
        for a, b in zip(one, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gradient_holds_one_convolution_for_each_map(stride):
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    traced = jax.jit(jax.grad(lambda x, w: jnp.sum(conv2d(x, w, stride) ** 2), (0, 1))).trace(x, w)
    for platform in ("cpu", "cuda", "tpu"):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == 3


@pytest.mark.parametrize(
    ("stride", "size", "channels"),
    [(1, (8, 8), (32, 32)), (2, (16, 16), (3, 3)), (2, (8, 8), (16, 16))],
    ids=str,
)
def test_kernels_are_made_before_a_loop_in_both_directions(stride, size, channels):
    x, w, g = drawn_for(stride, size, channels=channels, dtype=jnp.float32)

    def both_directions(x, g):
        forward = jax.jvp(lambda x, g: (conv2d(x, w, stride), conv_transpose2d(g, w, stride, size)), (x, g), (x, g))
        pulled = jax.vjp(lambda x, g: (conv2d(x, w, stride), conv_transpose2d(g, w, stride, size)), x, g)[1]
        return forward, pulled((g, x))

    for context in (contextlib.nullcontext, cpu.disabled):
        with context():
            loop, constants = hoist(both_directions, x, g)
            inner = jax.make_jaxpr(lambda x, g: loop(constants, x, g))(x, g)  # noqa: B023
        inside = [eqn.primitive.name for eqn in inner.eqns]
        assert inside.count("convolution") == 3 and inside.count("convolution_input_gradient") == 3
        assert not {"rev", "transpose", "optimization_barrier", "dot_general"} & set(inside)


def test_the_precision_is_that_of_the_place_where_a_convolution_is_written():
    def loss(x, w):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(conv2d(x, w) ** 2)

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len([line for line in text.splitlines() if "convolution" in line and "HIGHEST" in line]) == 3


MESHES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mpisjax.nn.convolution import conv2d, conv_transpose2d

rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in ((8, 8, 8, 16), (3, 3, 16, 16)))
mesh = {t: jax.make_mesh((4,), ("data",), axis_types=(t,)) for t in (AxisType.Auto, AxisType.Explicit)}

def loss(x, w):
    return jnp.sum(jnp.sin(conv_transpose2d(conv2d(x, w, 2), w, 2, (8, 8))))

def product(loss):
    return lambda x, w: jax.jvp(jax.grad(loss, (0, 1)), (x, w), (x, w))

def check(found):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())

alone = jax.jit(product(loss))(x, w)

for kind in mesh:
    with jax.set_mesh(mesh[kind]):
        rows, whole = NamedSharding(mesh[kind], P("data")), NamedSharding(mesh[kind], P())
        shared = jax.device_put(x, rows), jax.device_put(w, whole)
        run = jax.jit(product(loss)).lower(*shared).compile()
        found = run(*shared)
        check(found)
        assert found[0][0].sharding.spec[0] == "data" and found[0][1].sharding.is_fully_replicated
        assert "all-gather" not in run.as_text()

split = {"mesh": mesh[AxisType.Auto], "in_specs": (P("data"), P()), "check_vma": True}
summed = jax.shard_map(lambda x, w: lax.psum(loss(x, w), "data"), out_specs=P(), **split)
check(jax.jit(product(summed))(x, w))
within = jax.shard_map(product(lambda x, w: lax.psum(loss(x, w), "data")), out_specs=((P("data"), P()),) * 2, **split)
check(jax.jit(within)(x, w))

def descended(x, w):
    step = lambda s: (s[0] + 1, s[1] - 0.1 * jax.grad(loss)(s[1], w))
    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

a = jax.jit(jax.shard_map(descended, out_specs=P("data"), **split))(x, w)
np.testing.assert_allclose(a, jax.jit(descended)(x, w), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_derivatives_over_devices_of_every_kind_of_mesh(python, compiled):
    done = python("-c", MESHES, MPISJAX_CPU=compiled, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
