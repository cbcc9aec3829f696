"""Samples of a batch never decide for one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward

pytestmark = pytest.mark.unoptimized

FORWARDS = {
    "picard": RateForward("picard", 60, 1e-4),
    "anderson": RateForward("anderson", 60, 1e-4),
    "spikes": SpikeForward(20),
    "early stop": SpikeForward(60, tol=0.02),
}
ADJOINTS = {
    "neumann": Adjoint("neumann", 60, 1e-4),
    "anderson": Adjoint("anderson", 60, 1e-4),
    "gmres": Adjoint("gmres", 60, 1e-4),
    "bicgstab": Adjoint("bicgstab", 60, 1e-4),
    "normal_cg": Adjoint("normal_cg", 60, 1e-4),
    "phantom": Adjoint("phantom", 8),
}
ROWS, WIDTH = 128, 3


def transition(p, z, x, fire):
    return fire("o", x["gain"] * (z @ p) + x["current"])


@functools.cache
def compiled(forward, adjoint, rows):
    """The gradient of each sample's input, and the reports by sample: a program for each number of samples."""

    def run(mixing, x, g):
        def loss(x, probe):
            init = jnp.zeros((rows, WIDTH), jnp.float32)
            eq = mpisjax.equilibrium_forward(transition, mixing, x, init, forward=forward, adjoint=adjoint, probe=probe)
            return jnp.sum(g * eq.rates), eq

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, mpisjax.adjoint_probe(rows))

    return jax.jit(run)


def gradients(rows, forward, adjoint, spoiled):
    """Of some rows of a problem in which row 5 is spoiled."""
    rng = np.random.default_rng(0)
    mixing = rng.uniform(0.1, 0.5, (WIDTH, WIDTH)).astype(np.float32)
    mixing = jnp.asarray(mixing / np.abs(np.linalg.eigvals(mixing)).max())
    gain = rng.uniform(0.2, 0.7, (ROWS, 1)).astype(np.float32)
    current = rng.uniform(0.01, 0.2, (ROWS, WIDTH)).astype(np.float32)
    g = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    if spoiled == "diverges":
        gain[5], current[5] = -1.9, 0.6
    elif spoiled == "not a number":
        current[5] = np.nan
    elif spoiled == "cotangent":
        g[5] = np.nan
    x = {"gain": jnp.asarray(gain[rows]), "current": jnp.asarray(current[rows])}
    (found, stats), eq = compiled(forward, adjoint, len(rows))(mixing, x, jnp.asarray(g[rows]))
    return found, stats, eq


@pytest.mark.parametrize("spoiled", ["diverges", "not a number", "cotangent"])
@pytest.mark.parametrize(
    ("forward", "adjoint"),
    [(f, "neumann") for f in FORWARDS] + [("picard", a) for a in ADJOINTS if a != "neumann"],
)
def test_one_bad_sample_leaves_the_others_as_they_are_alone(forward, adjoint, spoiled):
    forward, adjoint = FORWARDS[forward], ADJOINTS[adjoint]
    together, stats, eq = gradients(np.arange(ROWS), forward, adjoint, spoiled)
    for i in (0, 4, 6, 127):
        alone, own_stats, own = gradients(np.array([i]), forward, adjoint, spoiled)
        np.testing.assert_allclose(eq.rates[i], own.rates[0], atol=1e-6)
        np.testing.assert_allclose(eq.residual[i], own.residual[0], atol=1e-6)
        assert eq.converged[i] == own.converged[0]
        for k in alone:
            scale = 1 + np.abs(alone[k][0])
            np.testing.assert_allclose(together[k][i] / scale, alone[k][0] / scale, atol=1e-6)
        assert stats.num_steps[i] == own_stats.num_steps[0]
        np.testing.assert_allclose(stats.residual[i], own_stats.residual[0], rtol=1e-3, atol=1e-6)
    others = np.arange(ROWS) != 5
    assert np.isfinite(together["current"][others]).all()


def test_the_slope_of_each_sample_is_exact_beside_one_that_diverges():
    """127 samples of slope 0.8, whose gradient is 1 / (1 - 0.8) = 5, and one of slope 1.5."""
    slopes = jnp.full((128, 1), 0.8).at[7].set(1.5)
    x = jnp.full((128, 1), 0.1).at[7].set(-0.1)

    def loss(x):
        eq = mpisjax.equilibrium_forward(
            lambda p, z, x, fire: fire("o", x["slope"] * z + x["current"]),
            {},
            {"slope": slopes, "current": x},
            jnp.zeros((128, 1)).at[7].set(0.2),
            forward=RateForward(max_steps=200, tol=1e-6),
            adjoint=Adjoint(max_steps=200, tol=1e-6),
        )
        return eq.rates.sum()

    found = jax.grad(loss)(x)
    np.testing.assert_allclose(np.delete(found, 7), 5, rtol=1e-4)
    assert np.isfinite(found[7])


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_sample_goes_on_until_its_slowest_and_smallest_stream_has_settled(solver):
    """The quick stream settles at once, a thousand times larger than the slow one: it neither hides nor stops it."""

    def two_streams(p, z, x, fire):
        return {"quick": fire("quick", x), "slow": fire("slow", 0.9 * z["slow"] + 1e-4 * z["quick"])}

    x = jnp.full((3, 2), 0.5).at[1].set(0)
    eq = mpisjax.equilibrium_forward(
        two_streams, {}, x, {"quick": x, "slow": jnp.zeros((3, 2))}, forward=RateForward(solver, 200, 1e-4)
    )
    assert eq.converged.all()
    assert (eq.residual["quick"] == 0).all() and (eq.residual["slow"] <= 1e-4).all()
    assert eq.residual["slow"][0] > 0, "reported by stream"
    np.testing.assert_allclose(eq.rates["slow"], 1e-3 * x, rtol=2e-3)  # tol / (1 - 0.9), and rounding


def test_a_transition_that_couples_its_samples_is_one_problem(x64):
    """Each sample sees the mean of all: the dense solve over the whole batch is right, one sample's is not."""
    weight = 0.6

    def coupled(p, z, x, fire):
        return fire("o", p * z.mean(0, keepdims=True) + x)

    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.3, (4, 2)))
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))

    def loss(x):
        eq = mpisjax.equilibrium_forward(
            coupled,
            weight,
            x,
            jnp.zeros((4, 2)),
            forward=RateForward(max_steps=300, tol=1e-13),
            adjoint=Adjoint("gmres", 300, 1e-13, history=8),
            batch_axis=None,
        )
        assert eq.converged.shape == eq.residual.shape == ()
        return jnp.sum(g * eq.rates)

    dense = np.linalg.solve(np.eye(4) - weight * np.full((4, 4), 0.25).T, np.asarray(g))
    np.testing.assert_allclose(jax.grad(loss)(x), dense, atol=1e-9)


def test_a_wild_iterate_of_a_krylov_solver_is_not_returned(x64):
    """Near an eigenvalue of 1 bicgstab breaks down: what comes back is never worse than the one-step gradient."""
    from mpisjax.solvers import solve_adjoint

    rng = np.random.default_rng(0)
    for eigenvalue in (1.0, 1.0 + 1e-12, 1.0 - 1e-9):
        basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        matrix = basis @ np.diag([eigenvalue, -3.0, 0.5, 0.9, 1.1, -0.2]) @ basis.T
        g = rng.normal(size=6)
        for solver in ADJOINTS:
            config = Adjoint(solver, 40, 1e-8)
            v, stats = solve_adjoint(lambda c, v: c[0] @ v, [jnp.asarray(matrix)], jnp.asarray(g), config, None)
            if solver == "phantom":
                continue
            true = np.linalg.norm(g - (v - matrix @ v)) / np.linalg.norm(g)
            assert np.isfinite(v).all()
            assert stats.residual <= 1.001 * np.linalg.norm(matrix @ g) / np.linalg.norm(g)
            if solver in ("gmres", "bicgstab", "normal_cg"):
                assert true == pytest.approx(float(stats.residual), rel=0.5, abs=1e-6)


@pytest.mark.parametrize("solver", ["neumann", "anderson", "gmres", "bicgstab", "normal_cg"])
def test_more_steps_never_give_a_worse_adjoint(x64, solver):
    """The iterate with the smallest residual comes back, also where the residuals rise on the way."""
    from mpisjax.solvers import solve_adjoint

    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(12, 12)) / 2  # of spectral radius above 1
    g = rng.normal(size=12)
    found = []
    for steps in (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24):
        config = Adjoint(solver, steps, 0.0, history=4)
        v, _ = solve_adjoint(lambda c, v: c[0] @ v, [jnp.asarray(matrix)], jnp.asarray(g), config, None)
        found.append(np.linalg.norm(g - (v - matrix @ v)) / np.linalg.norm(g))
    # A fixed-point solver's newest iterate, which is not measured yet, may be returned while the residual falls.
    slack = 1.2 if solver in ("neumann", "anderson") else 1 + 1e-9
    assert all(after <= slack * min(found[: n + 1]) + 1e-12 for n, after in enumerate(found[1:]))
