"""Solvers on random affine and clipped maps, contractive or not: they meet their tolerance or say they do not.

Every width is padded to one, so that each solver compiles once a precision.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward
from mpisjax.solvers import solve_adjoint, solve_rates

pytestmark = pytest.mark.unoptimized

WIDTH, STEPS = 64, 200
TOL = {np.float32: 1e-4, np.float64: 1e-8}
SCALES = {"zero": 0.0, "denormal": 1e-41, "tiny": 1e-30, "plain": 1.0, "saturating": 50.0, "huge": 1e30}
DENORMAL = {np.float32: 1e-41, np.float64: 1e-310}

precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
maps = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "width": st.integers(1, WIDTH),
        "radius": st.floats(0, 1.2),
        "normal": st.booleans(),
        "scale": st.sampled_from(list(SCALES)),
    }
)
examples = hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)


def random_map(m, dtype):
    """(matrix, vector) padded with zeros to WIDTH; the matrix has exactly the spectral radius asked for."""
    rng = np.random.default_rng(m["seed"])
    A = rng.normal(size=(m["width"], m["width"]))
    A = A + A.T if m["normal"] else A
    radius = np.abs(np.linalg.eigvals(A)).max()
    A = A * (m["radius"] / radius) if radius > 1e-3 else np.zeros_like(A)
    pad = WIDTH - m["width"]
    b = rng.normal(size=m["width"]) + 0.2
    scale = DENORMAL[dtype] if m["scale"] == "denormal" else SCALES[m["scale"]]
    A, b = np.pad(A, (0, pad)).astype(dtype), np.pad(b, (0, pad)) * scale
    return A, b.astype(dtype)


def bounds(A):
    """(spectral radius, Lipschitz constant)."""
    return np.abs(np.linalg.eigvals(A)).max(), np.linalg.norm(A.astype(float), 2)


@functools.cache
def forward_solver(solver, clipped, dtype, damping=0.0):
    def solve(A, b):
        def f(constants, r):
            A, b = constants
            return jnp.clip(A @ r + b, 0, 1) if clipped else A @ r + b

        config = RateForward(solver, STEPS, TOL[dtype], damping=damping)
        return solve_rates(f, [A, b], jnp.zeros_like(b), config, batch_axis=None)

    return jax.jit(solve)


def check_reported(value, stepped, reported, tol, growth, dtype):
    """A residual within the tolerance has to be true of the value, which is one application further on."""
    assert np.isfinite(value).all() and np.isfinite(reported)
    true = np.linalg.norm(stepped - value) / max(np.linalg.norm(stepped), np.finfo(dtype).eps)
    if reported <= tol:
        assert true <= 2 * max(1, growth) * tol + 50 * np.finfo(dtype).eps


@precisions
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@examples
@hypothesis.given(m=maps)
def test_affine_maps(m, solver, dtype):
    # Unbounded maps of huge currents overflow by themselves; bounded ones follow.
    hypothesis.assume(m["scale"] not in ("huge",))
    A, b = random_map(m, dtype)
    radius, lipschitz = bounds(A)
    with jax.enable_x64(dtype is np.float64):
        found = jax.device_get(forward_solver(solver, False, dtype)(A, b))
    A, b, value, tol = A.astype(float), b.astype(float), found.value.astype(float), TOL[dtype]
    check_reported(value, A @ value + b, found.residual, tol, lipschitz, dtype)
    assert 1 <= found.num_steps <= STEPS
    if lipschitz < 0.85:
        assert found.residual <= tol
        dense = np.linalg.solve(np.eye(WIDTH) - A, b)
        assert np.linalg.norm(value - dense) <= 2 * tol / (1 - lipschitz) * np.linalg.norm(dense) + 1e-25
    if solver == "picard" and radius > 1.05 and m["scale"] in ("plain", "saturating"):
        assert found.residual > tol and found.num_steps == STEPS


@precisions
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@examples
@hypothesis.given(m=maps)
def test_clipped_maps(m, solver, dtype):
    A, b = random_map(m, dtype)
    _, lipschitz = bounds(A)
    with jax.enable_x64(dtype is np.float64):
        found = jax.device_get(forward_solver(solver, True, dtype)(A, b))
    A, b, value, tol = A.astype(float), b.astype(float), found.value.astype(float), TOL[dtype]

    def f(r):
        return np.clip(A @ r + b, 0, 1)

    check_reported(value, f(value), found.residual, tol, lipschitz, dtype)
    assert value.min() >= 0 and value.max() <= 1
    if lipschitz < 0.85:
        assert found.residual <= tol
        solved = np.zeros(WIDTH)
        for _ in range(400):
            solved = f(solved)
        assert np.linalg.norm(value - solved) <= 2 * tol / (1 - lipschitz) * np.linalg.norm(solved) + 1e-25


def test_damping_settles_a_map_that_overshoots_and_keeps_the_fixed_point():
    A = np.zeros((WIDTH, WIDTH), np.float32)
    A[0, 0], b = -1.5, np.eye(WIDTH, dtype=np.float32)[0]
    swinging = forward_solver("picard", True, np.float32)(A, b)
    damped = forward_solver("picard", True, np.float32, 0.5)(A, b)
    assert swinging.residual > 0.1 and damped.residual <= TOL[np.float32]
    # The residual is f's own: ||f(r) - r|| / ||f(r)||, whatever the damping.
    r = float(damped.value[0])
    assert r == pytest.approx(0.4, rel=1e-3)


@functools.cache
def adjoint_solver(solver, dtype, damping=0.0):
    config = Adjoint(solver, STEPS, TOL[dtype], history=20 if solver == "gmres" else 5, damping=damping)
    return jax.jit(
        lambda A, g: solve_adjoint(lambda c, v: {"v": c[0].T @ v["v"]}, [A], {"v": g}, config, batch_axis=None)
    )


@precisions
@pytest.mark.parametrize("solver", ["neumann", "anderson", "gmres", "bicgstab", "normal_cg"])
@examples
@hypothesis.given(m=maps)
def test_adjoint_systems(m, solver, dtype):
    A, g = random_map(m, dtype)
    with jax.enable_x64(dtype is np.float64):
        v, stats = jax.device_get(adjoint_solver(solver, dtype)(A, g))
    radius, lipschitz = bounds(A)
    A, g, v, tol = A.astype(float), g.astype(float), v["v"].astype(float), TOL[dtype]
    assert np.isfinite(v).all() and not np.isnan(stats.residual)
    size = np.linalg.norm(g)
    flushed = m["scale"] == "denormal"  # XLA may take denormals for zeros
    if not size or flushed:
        assert np.linalg.norm(v) < 1e-30
        return
    true = np.linalg.norm(g - (v - A.T @ v)) / size
    if stats.residual <= tol:
        assert true <= 2 * max(1, lipschitz) * tol + 50 * np.finfo(dtype).eps
    if lipschitz < 0.85:
        assert stats.residual <= 2 * tol
        dense = np.linalg.solve(np.eye(WIDTH) - A.T, g)
        assert np.linalg.norm(v - dense) <= 4 * tol / (1 - lipschitz) * np.linalg.norm(dense)
    if solver == "neumann" and radius > 1.05:
        assert stats.residual > tol
        # The best iterate, not the last: no farther from a solution than where it set out.
        assert true <= 1.5 * max(1, lipschitz)


@pytest.mark.parametrize("solver", ["neumann", "phantom"])
def test_damping_settles_an_adjoint_that_overshoots_and_keeps_its_solution(solver, x64):
    # Eigenvalues from -1.4 to 0.5: they lie between -0.44 and 0.7 once damped by 0.4.
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    A = basis @ np.diag(np.linspace(-1.4, 0.5, WIDTH)) @ basis.T
    g = rng.normal(size=WIDTH)
    v, stats = jax.device_get(adjoint_solver(solver, np.float64, 0.4)(A, g))
    _, swinging = jax.device_get(adjoint_solver(solver, np.float64)(A, g))
    np.testing.assert_allclose(v["v"], np.linalg.solve(np.eye(WIDTH) - A.T, g), atol=1e-6)
    assert swinging.residual > 0.1 and stats.residual <= TOL[np.float64]


def test_a_damped_adjoint_reports_the_residual_of_the_system_itself(x64):
    A, g = random_map({"seed": 1, "width": 20, "radius": 0.9, "normal": False, "scale": "plain"}, np.float64)
    keep, steps, v = 0.3, 3, g
    config = Adjoint("neumann", steps, 0.0, damping=keep)
    found, stats = solve_adjoint(lambda c, v: c[0].T @ v, [jnp.asarray(A)], jnp.asarray(g), config, batch_axis=None)
    for _ in range(steps):
        before, v = v, keep * v + (1 - keep) * (g + A.T @ v)
    np.testing.assert_allclose(found, v, rtol=1e-10)
    residual = np.linalg.norm(g - (before - A.T @ before)) / np.linalg.norm(g)
    assert float(stats.residual) == pytest.approx(residual, rel=1e-5) and float(stats.num_steps) == steps


@pytest.mark.parametrize("solver", ["neumann", "normal_cg"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_adjoint_solves_neither_overflow_nor_underflow(size, solver):
    A, g = random_map({"seed": 0, "width": 9, "radius": 0.6, "normal": True, "scale": "plain"}, np.float32)
    v, stats = jax.device_get(adjoint_solver(solver, np.float32)(A, g))
    scaled, scaled_stats = jax.device_get(adjoint_solver(solver, np.float32)(A, g * np.float32(size)))
    np.testing.assert_allclose(scaled["v"] / np.float32(size), v["v"], rtol=1e-3, atol=1e-5)
    assert stats.residual <= 1e-4 and scaled_stats.residual <= 1e-4
    assert stats.num_steps == scaled_stats.num_steps


def test_gradients_that_are_not_finite_stay_so():
    A = np.eye(WIDTH, dtype=np.float32) / 2
    for bad in (np.nan, np.inf):
        for solver in ("neumann", "normal_cg"):
            v, _ = adjoint_solver(solver, np.float32)(A, np.full(WIDTH, bad, np.float32))
            assert not np.isfinite(v["v"]).any()


@functools.cache
def whole(forward, dtype):
    def run(A, b, rows):
        def transition(p, z, x, fire):
            return fire("a", z @ p + x)

        def loss(A, x, probe):
            eq = mpisjax.equilibrium_forward(
                transition,
                A,
                x,
                jnp.zeros_like(x),
                forward=forward,
                adjoint=Adjoint("neumann", 50, TOL[dtype]),
                probe=probe,
            )
            return jnp.sum(eq.rates), eq

        x = rows[:, None] * b
        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(A, x, mpisjax.adjoint_probe())

    return jax.jit(run)


@precisions
@pytest.mark.parametrize(
    "forward",
    [SpikeForward(1), SpikeForward(7), SpikeForward(200), SpikeForward(200, tol=1e-2), RateForward()],
    ids=["T=1", "T=7", "T=200", "early stop", "rates"],
)
@examples
@hypothesis.given(m=maps)
def test_an_equilibrium_is_finite_or_flagged(m, forward, dtype):
    A, b = random_map(m, dtype)
    rows = np.array([0.0, 0.3, 1.0], dtype)
    with jax.enable_x64(dtype is np.float64):
        ((dA, dx, stats), eq) = jax.device_get(whole(forward, dtype)(A.T, b, rows))
    assert np.isfinite(dA).all() and np.isfinite(dx).all() and np.isfinite(stats.residual)
    assert eq.rates.min() >= 0 and eq.rates.max() <= 1
    assert np.isfinite(eq.residual).all()
    tolerance = forward.tol if isinstance(forward, RateForward) else forward.residual_tol
    assert (eq.residual[eq.converged] <= tolerance).all()
    if getattr(forward, "num_steps", None) != 200 or forward.tol is None:
        np.testing.assert_array_equal(eq.converged, eq.residual <= tolerance)
    assert eq.converged[0] and not eq.rates[0].any()  # no input, no activity, nothing left to settle
    true = np.linalg.norm(np.clip(rows[:, None] * b + eq.rates @ A.T.astype(float), 0, 1) - eq.rates, axis=1)
    stepped = np.linalg.norm(eq.rates, axis=1)
    # One application of the map after the residual was taken.
    _, lipschitz = bounds(A)
    worst = np.maximum(eq.residual * stepped * max(1, lipschitz) * 1.01, 1e-5)
    assert (true <= worst).all()


@precisions
@hypothesis.settings(deadline=None, max_examples=6, derandomize=True, database=None)
@hypothesis.given(m=maps, steps=st.integers(1, STEPS), full=st.booleans())
def test_any_number_of_time_steps_of_any_width(m, steps, full, dtype):
    """Not padded, and from all zeros or all ones; the simulation is written out again in NumPy."""
    A, b = random_map(m, dtype)
    A, b = A[: m["width"], : m["width"]], b[: m["width"]]
    x, start = np.stack([b, 0 * b]), np.full((2, m["width"]), full, dtype)
    with jax.enable_x64(dtype is np.float64):

        @jax.jit
        def run(A, x):
            return mpisjax.equilibrium_forward(
                lambda p, z, x, fire: fire("a", z @ p + x),
                A,
                x,
                start,
                neuron=mpisjax.IF(initial_potential=0.0),
                forward=SpikeForward(steps),
                returns="spikes",
            )

        eq = jax.device_get(run(A.T, x))
    potential, spikes, count = np.zeros_like(x), start, np.zeros_like(x)
    for _ in range(steps):
        potential = potential + (spikes @ A.T + x)
        spikes = (potential >= 1).astype(dtype)
        potential = potential - spikes
        count += spikes
    assert eq.rates.min() >= 0 and eq.rates.max() <= 1 and np.isfinite(eq.residual).all()
    assert eq.num_steps == steps
    # A sum rounded otherwise may bring a spike one step earlier or later, and the chain after it.
    agree = np.abs(eq.rates * steps - count) <= 1e-3
    assert agree.mean() >= (0.9 if m["scale"] == "plain" else 0.98), (eq.rates * steps, count)
    np.testing.assert_array_equal(eq.converged, eq.residual <= 0.25)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RateForward("newton"), "forward.solver"),
        (lambda: RateForward(max_steps=0), "forward.max_steps"),
        (lambda: RateForward(tol=-1.0), "forward.tol"),
        (lambda: RateForward(tol=float("nan")), "forward.tol"),
        (lambda: RateForward(damping=1.0), "forward.damping"),
        (lambda: RateForward("anderson", history=1), "forward.history"),
        (lambda: Adjoint("cg"), "adjoint.solver"),
        (lambda: Adjoint(max_steps=0), "adjoint.max_steps"),
        (lambda: Adjoint("phantom", max_steps=-1), "adjoint.max_steps"),
        (lambda: Adjoint("gmres", history=1), "adjoint.history"),
        (lambda: Adjoint(damping=-0.1), "adjoint.damping"),
        (lambda: Adjoint("bicgstab", damping=0.2), "adjoint.damping"),
    ],
)
def test_impossible_settings_are_refused(make, named):
    with pytest.raises(mpisjax.UserError, match=named):
        make()
