"""`equilibrium_forward`: gradients against dense solves and central differences, transformations, reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward

pytestmark = pytest.mark.unoptimized

TIGHT = {
    "neumann": Adjoint("neumann", 400, 1e-13),
    "anderson": Adjoint("anderson", 400, 1e-13),
    "gmres": Adjoint("gmres", 400, 1e-13, history=30),
    "bicgstab": Adjoint("bicgstab", 400, 1e-13),
    "normal_cg": Adjoint("normal_cg", 800, 1e-13),
}
# Rounding alone leaves 1e-15, and the reported residual, compiled outside the loop, rounds in its own way.
SOLVED = RateForward("picard", 400, 5e-15)


def transition(p, z, x, fire):
    """Two coupled streams of different widths, three populations."""
    hidden = fire("hidden", x["now"] @ p["in"] + z["a"] @ p["back"] + p["bias"])
    a = fire("a", hidden @ p["up"] + 0.3 * jnp.sin(z["b"]) @ p["cross"])
    return {"a": a, "b": fire("b", a @ p["down"] + x["more"])}


def problem(seed=0, batch=2, dtype=np.float64):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=0.35):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    params = {
        "in": normal(3, 5),
        "back": normal(4, 5),
        "up": normal(5, 4),
        "cross": normal(3, 4),
        "down": normal(4, 3),
        "bias": jnp.asarray(rng.uniform(0.3, 0.6, 5), dtype),
    }
    x = {"now": normal(batch, 3), "more": jnp.asarray(rng.uniform(0.1, 0.5, (batch, 3)), dtype)}
    init = {"a": jnp.zeros((batch, 4), dtype), "b": jnp.zeros((batch, 3), dtype)}
    weights = {"a": normal(batch, 4, scale=1), "b": normal(batch, 3, scale=1)}
    return params, x, init, weights


NEURON = mpisjax.IF(threshold=0.8)


class Reading:
    """DBReLU written out again, with the currents kept."""

    def __init__(self):
        self.currents = {}

    def __call__(self, name, current):
        self.currents[name] = current / NEURON.threshold
        return jnp.clip(self.currents[name], 0, 1)


def reference_map(p, z, x):
    return transition(p, z, x, Reading())


@functools.partial(jax.jit, static_argnums=3)
def settle(p, x, init, steps=300):
    return jax.lax.fori_loop(0, steps, lambda _, z: reference_map(p, z, x), init)


def objective(rates, weights):
    return sum(jnp.vdot(w, r + r**2) for w, r in zip(jax.tree.leaves(weights), jax.tree.leaves(rates), strict=True))


@jax.jit
def dense_gradient(p, x, rates, g):
    """(df/d(p, x))^T v with v = (I - J^T)^-1 g, J written out as a matrix."""
    flat, unravel = ravel_pytree(rates)
    J = jax.jacobian(lambda r: ravel_pytree(reference_map(p, unravel(r), x))[0])(flat)
    v = jnp.linalg.solve(jnp.eye(flat.size) - J.T, ravel_pytree(g)[0])
    return jax.vjp(lambda p, x: reference_map(p, rates, x), p, x)[1](unravel(v))


def assert_leaves_close(found, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def assert_off_the_kinks(p, x, rates):
    fire = Reading()
    transition(p, rates, x, fire)
    currents = ravel_pytree(fire.currents)[0]
    assert np.minimum(np.abs(currents), np.abs(currents - 1)).min() > 1e-4, "choose another seed"
    inside = (currents > 0) & (currents < 1)
    assert 0.3 < inside.mean() < 1, "both the slope and the bounds should occur"


@pytest.mark.parametrize("solver", TIGHT)
def test_gradients_equal_a_dense_solve(x64, solver):
    p, x, init, weights = problem()

    @jax.jit
    def gradient(p, x):
        def loss(p, x, probe):
            eq = mpisjax.equilibrium_forward(
                transition,
                p,
                x,
                init,
                neuron=NEURON,
                forward=SOLVED,
                adjoint=TIGHT[solver],
                probe=probe,
            )
            return objective(eq.rates, weights), eq

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(p, x, mpisjax.adjoint_probe())

    (*found, stats), eq = gradient(p, x)
    rates = settle(p, x, init)
    assert_off_the_kinks(p, x, rates)
    assert eq.converged.all() and max(r.max() for r in jax.tree.leaves(eq.residual)) < 1e-14
    assert_leaves_close(eq.rates, rates, 1e-13)
    g = jax.grad(objective)(rates, weights)
    assert_leaves_close(found, dense_gradient(p, x, rates, g), 1e-9)
    assert stats.residual < 1e-11
    if solver in ("neumann", "anderson", "bicgstab"):
        assert 3 <= stats.num_steps <= TIGHT[solver].max_steps
    else:
        assert stats.num_steps == -1


def test_gradients_equal_central_differences_of_the_solved_equilibrium(x64):
    p, x, init, weights = problem()
    rates = settle(p, x, init)
    assert_off_the_kinks(p, x, rates)

    @jax.jit
    def loss(p, x):
        eq = mpisjax.equilibrium_forward(
            transition, p, x, init, neuron=NEURON, forward=SOLVED, adjoint=TIGHT["neumann"]
        )
        return objective(eq.rates, weights)

    @jax.jit
    def solved_again(flat):
        return objective(settle(*unravel(flat), init), weights)

    flat, unravel = ravel_pytree((p, x))
    step = 1e-5
    numbers = [
        (solved_again(flat.at[i].add(step)) - solved_again(flat.at[i].add(-step))) / (2 * step)
        for i in range(flat.size)
    ]
    assert_leaves_close(jax.grad(loss, argnums=(0, 1))(p, x), unravel(jnp.array(numbers)), 1e-6)


@pytest.mark.parametrize("forward", [SpikeForward(7), SpikeForward(50, tol=0.05), RateForward(max_steps=3, tol=0.0)])
@pytest.mark.parametrize("returns", ["equivalent", "spikes"])
def test_far_from_the_equilibrium_the_gradient_is_that_of_the_one_step(x64, forward, returns):
    """r* = f(r_T); J at r*; dL/dtheta through f at r_T: whatever r_T is."""
    p, x, init, weights = problem()

    def loss(p, x):
        eq = mpisjax.equilibrium_forward(
            transition,
            p,
            x,
            init,
            neuron=NEURON,
            forward=forward,
            adjoint=TIGHT["neumann"],
            returns=returns,
        )
        return objective(eq.rates, weights), eq

    (_, eq), found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(p, x)
    if isinstance(forward, SpikeForward):
        simulation = mpisjax.simulate(transition, p, x, init, neuron=NEURON, forward=forward)
        start = simulation.rates
        assert eq.num_steps == simulation.num_steps.max()
    else:
        start = settle(p, x, init, 3)
        assert eq.num_steps == 3
    stepped = reference_map(p, start, x)
    assert_leaves_close(eq.rates, start if returns == "spikes" else stepped, 1e-12)
    for k, residual in eq.residual.items():
        expected = np.linalg.norm(stepped[k] - start[k], axis=1) / np.linalg.norm(stepped[k], axis=1)
        np.testing.assert_allclose(residual, expected, rtol=1e-9)
    flat, unravel = ravel_pytree(stepped)
    J = jax.jacobian(lambda r: ravel_pytree(reference_map(p, unravel(r), x))[0])(flat)
    g = ravel_pytree(jax.grad(objective)(eq.rates, weights))[0]
    v = unravel(jnp.linalg.solve(jnp.eye(flat.size) - J.T, g))
    assert_leaves_close(found, jax.vjp(lambda p, x: reference_map(p, start, x), p, x)[1](v), 1e-9)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_phantom_gradient_is_a_neumann_series_cut_off(x64, steps):
    p, x, init, weights = problem()

    @jax.jit
    def gradient(p, probe):
        def loss(p, probe):
            eq = mpisjax.equilibrium_forward(
                transition,
                p,
                x,
                init,
                neuron=NEURON,
                forward=SOLVED,
                adjoint=Adjoint("phantom", steps),
                probe=probe,
            )
            return objective(eq.rates, weights)

        return jax.grad(loss, argnums=(0, 1))(p, probe)

    found, stats = gradient(p, mpisjax.adjoint_probe())
    rates = settle(p, x, init)
    flat, unravel = ravel_pytree(rates)
    J = jax.jacobian(lambda r: ravel_pytree(reference_map(p, unravel(r), x))[0])(flat)
    g = ravel_pytree(jax.grad(objective)(rates, weights))[0]
    terms = [jnp.linalg.matrix_power(J.T, k) @ g for k in range(steps + 1)]
    expected = jax.vjp(lambda p: reference_map(p, rates, x), p)[1](unravel(sum(terms)))[0]
    assert_leaves_close(found, expected, 1e-9)
    if steps:
        # Of the iterate before the last: g - (I - J^T) v_2 is the series' last term.
        last = float(jnp.linalg.norm(terms[-1]) / jnp.linalg.norm(g))
        assert stats.residual == pytest.approx(last, rel=1e-5)
    else:
        assert np.isnan(stats.residual)


@pytest.mark.parametrize("forward", [SpikeForward(9), RateForward(max_steps=50, tol=1e-6)])
def test_values_closed_over_get_the_gradients_that_parameters_get(forward):
    p, x, init, weights = problem(dtype=np.float32)

    def passed(p, x):
        eq = mpisjax.equilibrium_forward(transition, p, x, init, neuron=NEURON, forward=forward)
        return objective(eq.rates, weights)

    def closed_over(p, x):
        def closure(_, z, __, fire):
            return transition(p, z, x, fire)

        eq = mpisjax.equilibrium_forward(closure, {}, {}, init, neuron=NEURON, forward=forward)
        return objective(eq.rates, weights)

    expected = jax.jit(jax.grad(passed, argnums=(0, 1)))(p, x)
    assert_leaves_close(jax.jit(jax.grad(closed_over, argnums=(0, 1)))(p, x), expected, 1e-5)


@pytest.mark.parametrize("forward", [SpikeForward(9), RateForward(max_steps=50, tol=1e-6)])
def test_a_mapped_sample_is_a_row_of_the_batch(forward):
    p, x, init, weights = problem(batch=3, dtype=np.float32)
    options = {"neuron": NEURON, "forward": forward, "adjoint": Adjoint(max_steps=60, tol=1e-7)}

    def batched(p, x):
        eq = mpisjax.equilibrium_forward(transition, p, x, init, **options)
        return objective(eq.rates, weights), eq

    def mapped(p, x):
        eq = jax.vmap(lambda x, z: mpisjax.equilibrium_forward(transition, p, x, z, batch_axis=None, **options))(
            x, init
        )
        return objective(eq.rates, weights), eq

    def run(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(p, x)

    ((_, a), da), ((_, b), db) = run(batched), run(mapped)
    assert_leaves_close(b.rates, a.rates, 1e-5)
    assert_leaves_close(db, da, 1e-4)
    assert b.converged.shape == a.converged.shape == (3,)
    if isinstance(forward, SpikeForward):
        for k in a.residual:
            np.testing.assert_allclose(b.residual[k], a.residual[k], rtol=1e-4, atol=1e-6)


def test_many_batches_may_be_mapped():
    p, x, init, _ = problem(batch=2, dtype=np.float32)
    many = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), x)

    def run(x):
        return mpisjax.equilibrium_forward(transition, p, x, init, neuron=NEURON).rates

    run_each, run_all = jax.jit(run), jax.jit(jax.vmap(run))
    for i in range(2):
        one = run_each(jax.tree.map(lambda a, i=i: a[i], many))
        assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], run_all(many)), one, 1e-5)


@pytest.mark.parametrize("leak", [1.0, 0.8])
def test_input_over_time_is_read_as_its_weighted_mean(x64, leak):
    p, x, init, weights = problem()
    neuron, steps = mpisjax.LIF(0.8, leak), 6
    frames = jax.tree.map(lambda a: jnp.stack([a * (0.5 + 0.2 * t) for t in range(steps)]), x)
    by_age = leak ** np.arange(steps - 1, -1, -1)
    mean = jax.tree.map(lambda a: jnp.tensordot(by_age / by_age.sum(), a, 1), frames)

    def loss(p, x, time_axis):
        eq = mpisjax.equilibrium_forward(
            transition,
            p,
            x,
            init,
            neuron=neuron,
            forward=SOLVED,
            adjoint=TIGHT["neumann"],
            time_axis=time_axis,
        )
        return objective(eq.rates, weights)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    dp, dx = gradient(p, frames, 0)
    expected_dp, dmean = gradient(p, mean, None)
    assert_leaves_close(dp, expected_dp, 1e-12)
    expected_dx = jax.tree.map(
        lambda d: jnp.stack([d * w for w in by_age / by_age.sum()]),
        dmean,
    )
    assert_leaves_close(dx, expected_dx, 1e-12)
    spikes = mpisjax.equilibrium_forward(
        transition,
        p,
        frames,
        init,
        neuron=neuron,
        forward=SpikeForward(None),
        time_axis=0,
        returns="spikes",
    )
    simulated = mpisjax.simulate(transition, p, frames, init, neuron=neuron, forward=SpikeForward(None), time_axis=0)
    assert_leaves_close(spikes.rates, simulated.rates, 1e-12)
    assert spikes.num_steps == steps


def test_the_probe_reports_a_solve_that_stopped_short():
    p, x, init, weights = problem(dtype=np.float32)

    def loss(p, probe, steps):
        eq = mpisjax.equilibrium_forward(
            transition, p, x, init, neuron=NEURON, adjoint=Adjoint("neumann", steps, 1e-5), probe=probe
        )
        return objective(eq.rates, weights)

    report = jax.jit(jax.grad(loss, argnums=1), static_argnums=2)
    short = report(p, mpisjax.adjoint_probe(), 2)
    full = report(p, mpisjax.adjoint_probe(), 200)
    assert short.num_steps == 2 and short.residual > 1e-5
    assert 2 < full.num_steps < 200 and 0 < full.residual <= 1e-5


def expanding(p, z, x, fire):
    # Overshoots: the rates jump between 0 and 1 for ever.
    return fire("a", x - p * z)


def test_a_map_that_expands_is_flagged_and_finite_forward_and_backward():
    x, init = jnp.full((2, 3), 0.9), jnp.zeros((2, 3))

    @jax.jit
    def run(p):
        def loss(p, probe):
            eq = mpisjax.equilibrium_forward(expanding, p, x, init, forward=RateForward(max_steps=31), probe=probe)
            return eq.rates.sum(), eq

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(p, mpisjax.adjoint_probe())

    (grad, stats), eq = run(1.7)
    assert not eq.converged.any() and (eq.residual > 0.1).all() and eq.num_steps == 31
    assert np.isfinite(grad) and np.isfinite(eq.rates).all() and np.isfinite(stats.residual)
    (_, _), eq = run(0.5)
    assert eq.converged.all()


def test_values_that_are_not_a_number_are_not_convergence():
    x = jnp.array([[0.5, 0.5], [np.nan, 0.5]])
    for forward in (RateForward(), SpikeForward(5), SpikeForward(5, tol=0.1)):
        eq = mpisjax.equilibrium_forward(
            lambda p, z, x, fire: fire("a", x + 0.1 * z), {}, x, jnp.zeros((2, 2)), forward=forward
        )
        np.testing.assert_array_equal(eq.converged[1], False)


@pytest.mark.parametrize(
    "init",
    [
        {"a": jnp.zeros((2, 4))},
        {"a": jnp.zeros((2, 4)), "b": jnp.zeros((2, 2))},
        {"a": jnp.zeros((2, 4)), "b": jnp.zeros((2, 3), jnp.bfloat16)},
        jnp.zeros((2, 4)),
    ],
    ids=["structure", "shape", "dtype", "bare"],
)
def test_an_init_unlike_the_rates_is_refused_in_a_sentence(init):
    p, x, _, _ = problem(dtype=np.float32)

    def wants_both(p, z, x, fire):
        a = z["a"] if isinstance(z, dict) else z
        return {"a": fire("a", a + 0 * x["now"].sum()), "b": fire("b", x["more"])}

    with pytest.raises(mpisjax.UserError, match="init is") as caught:
        mpisjax.equilibrium_forward(wants_both, p, x, init)
    assert "structure, shapes and dtypes" in str(caught.value)


def test_an_unknown_result_is_refused():
    p, x, init, _ = problem(dtype=np.float32)
    with pytest.raises(mpisjax.UserError, match="returns is 'rates'"):
        mpisjax.equilibrium_forward(transition, p, x, init, returns="rates")
