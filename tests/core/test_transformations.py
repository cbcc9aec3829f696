"""`fire` inside JAX's transformations, debugging switches, x64, meshes, and programs that are the same in every
process.
"""

import contextlib
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward
from mpisjax.baselines import bptt

pytestmark = pytest.mark.unoptimized
ROOT = Path(__file__).parents[2]
DEPTH = 3


def problem():
    rng = np.random.default_rng(0)
    sizes = {"in": (5, 6), "back": (4, 6), "deep": (DEPTH, 6, 6), "out": (6, 4)}
    p = {k: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for k, s in sizes.items()}
    return p, jnp.asarray(rng.uniform(0.2, 1, (8, 5)), jnp.float32), jnp.zeros((8, 4), jnp.float32)


def unrolled(p, z, x, fire):
    h = fire("in", x @ p["in"] + z @ p["back"])
    for k in range(DEPTH):
        h = fire(f"deep{k}", h @ p["deep"][k])
    return fire("out", h @ p["out"])


def scanned(p, z, x, fire):
    h = fire("in", x @ p["in"] + z @ p["back"])
    h, _ = jax.lax.scan(lambda h, w: (fire("deep", h @ w), None), h, p["deep"])
    return fire("out", h @ p["out"])


def called(wrap):
    return lambda p, z, x, fire: wrap(lambda p, z, x: unrolled(p, z, x, fire))(p, z, x)


def branched(p, z, x, fire):
    there = jnp.sum(jnp.abs(p["in"])) > 0
    return jax.lax.cond(there, lambda: unrolled(p, z, x, fire), lambda: jnp.zeros_like(z))


WRITTEN = {
    "scan": scanned,
    "jit": called(jax.jit),
    "remat": called(jax.checkpoint),
    "vmap": called(lambda f: jax.vmap(f, in_axes=(None, 0, 0))),
    "cond": branched,
}


def value_and_grad(transition, forward, adjoint=None):
    p, x, init = problem()
    adjoint = adjoint or Adjoint(max_steps=60, tol=1e-6)

    def loss(p, x):
        eq = mpisjax.equilibrium_forward(transition, p, x, init, forward=forward, adjoint=adjoint)
        return jnp.sum(eq.rates**2), eq

    (_, eq), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(p, x)
    return eq, grads


@functools.cache
def outside(forward):
    return value_and_grad(unrolled, forward)


@pytest.mark.parametrize(
    "forward", [SpikeForward(6), SpikeForward(9, tol=0.1), RateForward(tol=1e-6)], ids=["T", "stop", "rates"]
)
@pytest.mark.parametrize("how", WRITTEN)
def test_fire_inside_a_transformation_is_fire_outside_it(how, forward):
    expected, expected_grads = outside(forward)
    found, grads = value_and_grad(WRITTEN[how], forward)
    assert np.any(expected.rates) and np.any(expected_grads[0]["deep"])
    np.testing.assert_allclose(found.rates, expected.rates, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected_grads)
    if how == "scan":  # one call is all layers' population
        assert found.layer_rates["deep"].shape == (DEPTH, 8, 6)
        np.testing.assert_allclose(found.layer_rates["deep"][1], expected.layer_rates["deep1"], atol=1e-6)


@pytest.mark.parametrize("tol", [None, 0.1])
def test_populations_inside_a_scan_are_recorded_sample_by_sample(tol):
    """With as many samples as layers, so that one axis could be taken for the other."""
    p, x, init = problem()
    x, init = x[:DEPTH] * jnp.array([[0.3], [1.0], [2.0]], jnp.float32), init[:DEPTH]
    found, expected = (
        mpisjax.simulate(t, p, x, init, neuron=mpisjax.IF(), forward=SpikeForward(40, tol=tol), record=True)
        for t in (scanned, unrolled)
    )
    if tol is not None:
        assert len(set(expected.num_steps.tolist())) > 1
    for k in range(DEPTH):
        np.testing.assert_allclose(found.layer_rates["deep"][k], expected.layer_rates[f"deep{k}"], atol=1e-6)
        np.testing.assert_array_equal(found.spike_counts["deep"][k], expected.spike_counts[f"deep{k}"])


def test_a_scan_of_a_thousand_layers_is_one_step():
    weights = jnp.full((1000, 2, 2), 0.5, jnp.float32)

    def deep(p, z, x, fire):
        h, _ = jax.lax.scan(lambda h, w: (fire("deep", h @ w), None), x + 0.1 * z, p)
        return fire("out", h)

    x = jnp.full((1, 2), 0.8, jnp.float32)
    run = jax.jit(
        lambda p: mpisjax.equilibrium_forward(deep, p, x, jnp.zeros((1, 2), jnp.float32), forward=SpikeForward(3)).rates
    )
    assert run(weights).shape == (1, 2)


@pytest.mark.parametrize(
    ("transition", "named"),
    [
        (
            lambda p, z, x, fire: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: fire("w", c), x[:, :4] + z),
            "'while'",
        ),
        (lambda p, z, x, fire: jax.vmap(jax.grad(lambda c: fire("g", c).sum()))(x[:, :4] + z), "outside it"),
    ],
    ids=["while", "grad"],
)
def test_where_a_state_cannot_be_followed_fire_is_refused(transition, named):
    p, x, init = problem()
    with pytest.raises(mpisjax.UserError, match=named):
        mpisjax.equilibrium_forward(transition, p, x, init)


SWITCHES = {
    "all": (jax.checking_leaks(), jax.numpy_rank_promotion("raise"), jax.debug_nans(True)),
    "x64": (jax.enable_x64(True),),
}
SOLVERS = [
    (SpikeForward(5), Adjoint("neumann")),
    (SpikeForward(20, tol=0.05), Adjoint("anderson")),
    (RateForward("anderson"), Adjoint("gmres")),
    (RateForward("picard"), Adjoint("bicgstab")),
    (RateForward("picard"), Adjoint("normal_cg")),
]


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("switch", SWITCHES)
def test_debugging_switches_find_nothing(switch):
    p, x, init = problem()

    def learned(p, z, x, fire):
        threshold = jnp.full((6,), 0.8, jnp.float32) + 0 * p["in"][0]
        return fire("out", fire("hidden", x @ p["in"] + z @ p["back"], mpisjax.LIF(threshold, 0.9)) @ p["out"])

    with contextlib.ExitStack() as on:
        for context in (*SWITCHES[switch], jax.numpy_dtype_promotion("strict")):
            on.enter_context(context)
        for forward, adjoint in SOLVERS:

            def loss(p, forward=forward, adjoint=adjoint):
                eq = mpisjax.equilibrium_forward(learned, p, x, init, forward=forward, adjoint=adjoint)
                return jnp.sum(eq.rates)

            found = jax.jit(jax.grad(loss))(p)
            assert found["in"].dtype == jnp.float32 and np.isfinite(found["in"]).all()

        def through_time(p):
            out = bptt.unroll(unrolled, p, x, init, neuron=mpisjax.IF(), num_steps=3, bptt=bptt.BPTT())
            return jnp.sum(out.readout)

        jax.jit(jax.grad(through_time))(p)


def test_without_jit_the_numbers_are_the_same():
    for forward in (SpikeForward(3), RateForward(max_steps=3)):
        expected = value_and_grad(unrolled, forward, Adjoint(max_steps=3))
        with jax.disable_jit():
            found = value_and_grad(unrolled, forward, Adjoint(max_steps=3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("solver", ["neumann", "anderson", "gmres", "bicgstab", "normal_cg"])
def test_streams_of_two_precisions(x64, solver):
    x = jnp.full((3, 2), 0.4, jnp.float32)

    def transition(p, z, x, fire):
        a = fire("a", 0.3 * z["a"] + 0.2 * z["b"].astype(jnp.float32) + p * x)
        return {"a": a, "b": fire("b", 0.5 * z["a"].astype(jnp.float64) + 0.1)}

    def loss(p):
        init = {"a": jnp.zeros((3, 2), jnp.float32), "b": jnp.zeros((3, 2), jnp.float64)}
        eq = mpisjax.equilibrium_forward(
            transition,
            p,
            x,
            init,
            forward=RateForward("anderson", 99, 1e-9),
            adjoint=Adjoint(solver, 99, 1e-9),
        )
        assert eq.rates["a"].dtype == jnp.float32 and eq.rates["b"].dtype == jnp.float64
        return jnp.sum(eq.rates["a"].astype(jnp.float64)) + jnp.sum(eq.rates["b"])

    # a = (p x + 0.02) / 0.6, b = a / 2 + 0.1, six entries of each.
    assert float(jax.jit(jax.grad(loss))(jnp.float32(0.5))) == pytest.approx(6 * 1.5 * 0.4 / 0.6, rel=1e-5)


def run_on_four_devices(code, **environment):
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_shard_map_and_explicit_meshes_give_what_one_device_gives():
    run_on_four_devices("""
        import jax, jax.numpy as jnp, numpy as np
        import mpisjax
        from mpisjax import Adjoint, RateForward, SpikeForward
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        rng = np.random.default_rng(0)
        sizes = {"in": (5, 6), "back": (4, 6), "out": (6, 4)}
        p = {k: jnp.asarray(rng.normal(size=s) * 0.4, jnp.float32) for k, s in sizes.items()}
        x = jnp.asarray(rng.uniform(size=(8, 5)), jnp.float32)

        def transition(p, z, x, fire):
            return fire("out", fire("hidden", x @ p["in"] + z @ p["back"]) @ p["out"])

        def step(p, z, x, fire):
            z = transition(p, z, x, fire)
            return z, z.mean(1)

        def close(found, expected):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)

        cases = [
            (SpikeForward(5), Adjoint("neumann"), None),
            (SpikeForward(20, tol=0.05), Adjoint("anderson"), step),
            (RateForward("picard"), Adjoint("normal_cg"), step),
            (RateForward("anderson"), Adjoint("phantom", 4), None),
            (RateForward("picard"), Adjoint("gmres"), None),
            (RateForward("picard"), Adjoint("bicgstab"), None),
        ]
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        for forward, adjoint, step in cases:
            def loss(p, x):
                eq = mpisjax.equilibrium_forward(
                    transition, p, x, jnp.zeros((len(x), 4)), forward=forward, adjoint=adjoint, step=step
                )
                return jnp.sum(eq.rates**2) + (0 if step is None else jnp.sum(eq.aux)), (eq.rates, eq.residual)

            run = jax.value_and_grad(loss, has_aux=True)
            expected = jax.jit(run)(p, x)
            explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
            with jax.set_mesh(explicit):
                rows, whole = NamedSharding(explicit, P("d")), NamedSharding(explicit, P())
                (value, (rates, residual)), grads = jax.jit(run)(jax.device_put(p, whole), jax.device_put(x, rows))
            close(((value, (rates, residual)), grads), expected)
            assert rates.sharding.spec[0] == "d"
            if adjoint.solver == "gmres":
                continue

            def local(p, x):
                (value, rates), grads = run(p, x)
                return (jax.lax.psum(value, "d"), rates), grads

            mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=((P(), P("d")), P()))
            close(jax.jit(mapped)(p, x), expected)

        def closing_over(p, x):
            fn = lambda _, z, x, fire: transition(p, z, x, fire)
            return jnp.sum(mpisjax.equilibrium_forward(fn, {}, x, jnp.zeros((8, 4))).rates)

        for call in (jax.jit(closing_over), closing_over):  # over traced arrays, and over concrete ones
            try:
                with jax.set_mesh(explicit):
                    call(jax.device_put(p, whole), jax.device_put(x, rows))
            except mpisjax.UserError as error:
                assert "closes over JAX arrays" in str(error)
            else:
                raise AssertionError("a closure on an explicit mesh")

        def refused(p, x):
            eq = mpisjax.equilibrium_forward(transition, p, x, jnp.zeros((len(x), 4)), adjoint=Adjoint("gmres"))
            return jax.lax.psum(jnp.sum(eq.rates), "d")

        try:
            jax.grad(jax.shard_map(refused, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))(p, x)
        except mpisjax.UserError as error:
            assert "neumann" in str(error)
        else:
            raise AssertionError("gmres inside shard_map")
    """)


PROGRAMS = """
    import hashlib, jax, jax.numpy as jnp
    import mpisjax
    from mpisjax.baselines import bptt
    from mpisjax import Adjoint, RateForward, SpikeForward

    p = {"in": jnp.ones((3, 4)), "back": jnp.ones((4, 4)), "scale": jnp.ones(4), "deep": jnp.ones((2, 4, 4))}
    x, init = jnp.ones((2, 3)), jnp.zeros((2, 4))

    def plain(p, z, x, fire):
        w = p["in"] / jnp.linalg.norm(p["in"], axis=0) * p["scale"]
        return fire("o", jnp.tanh(x @ w) + z @ (p["back"] / jnp.linalg.norm(p["back"])) * jnp.exp(p["scale"]))

    def scanned(p, z, x, fire):
        h, _ = jax.lax.scan(lambda h, w: (fire("d", h @ w), None), x @ p["in"] + z @ p["back"], p["deep"])
        return fire("o", h * p["scale"])

    def branched(p, z, x, fire):
        return jax.lax.cond(p["scale"].sum() > 0, lambda: plain(p, z, x, fire), lambda: fire("other", z))

    def remat(p, z, x, fire):
        return jax.checkpoint(lambda p, z, x: plain(p, z, x, fire))(p, z, x)

    def loss(transition, forward, adjoint):
        return lambda p, x: mpisjax.equilibrium_forward(
            transition, p, x, init, forward=forward, adjoint=adjoint
        ).rates.sum()

    def unrolled(p, x, remat):
        return bptt.unroll(
            plain, p, x, init, neuron=mpisjax.IF(), num_steps=3, bptt=bptt.BPTT(remat=remat)
        ).rates.sum()

    rates, spikes = RateForward("anderson"), SpikeForward(3)
    solved = ((rates, "neumann"), (spikes, "gmres"))
    programs = [jax.grad(loss(t, f, Adjoint(a))) for t in (plain, scanned, branched, remat) for f, a in solved]
    programs += [jax.grad(lambda p, x, r=r: unrolled(p, x, r)) for r in (False, True)]
    programs += [jax.vmap(loss(plain, spikes, Adjoint()), in_axes=(None, None), axis_size=2)]
    programs += [jax.hessian(loss(plain, rates, Adjoint()))]
    for program in programs:
        print(hashlib.sha256(jax.jit(program).lower(p, x).as_text().encode()).hexdigest())
"""


def test_a_program_has_the_same_text_in_every_process():
    """Twelve programs, with sets in two orders; another text would be compiled anew, and differ among a pod's hosts."""
    texts = {run_on_four_devices(PROGRAMS, PYTHONHASHSEED=seed) for seed in "12345"}
    assert len(texts) == 1 and len(set(texts.pop().split())) == 12


def test_name_scopes_survive():
    def transition(p, z, x, fire):
        with jax.named_scope("recognisable"):
            return fire("o", x @ p["in"] + z @ p["back"])

    p, x, _ = problem()
    p = {"in": p["in"], "back": jnp.ones((6, 6), jnp.float32)}
    init = jnp.zeros((8, 6), jnp.float32)
    for forward in (SpikeForward(2), RateForward()):
        run = jax.jit(lambda p, f=forward: mpisjax.equilibrium_forward(transition, p, x, init, forward=f).rates)
        assert "recognisable" in run.lower(p).as_text(debug_info=True)
        body = run.lower(p).compile().as_text()
        assert any("while" in line and "recognisable" in line for line in body.splitlines())
