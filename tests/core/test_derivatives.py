"""Derivatives of any order and in both modes, and of everything that comes out beside the rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward

pytestmark = pytest.mark.unoptimized

SOLVERS = ("neumann", "anderson", "gmres", "bicgstab", "normal_cg", "phantom")
SOLVED = RateForward("picard", 400, 1e-14)


def tight(solver):
    return Adjoint(solver, 60 if solver == "phantom" else 400, 1e-13, history=12)


def one_neuron(p, z, x, fire):
    return fire("o", p * z + x)


def squared(p, solver, x=0.3):
    eq = mpisjax.equilibrium_forward(
        one_neuron, p, jnp.full((1, 1), x), jnp.zeros((1, 1)), forward=SOLVED, adjoint=tight(solver)
    )
    return (eq.rates**2).sum()


@pytest.mark.parametrize("solver", SOLVERS)
def test_derivatives_of_one_neuron_to_the_third(x64, solver):
    """r = x / (1 - p): r^2 has the derivatives 2 x^2 / (1 - p)^3, 6 x^2 / (1 - p)^4, 24 x^2 / (1 - p)^5."""
    derivatives = {
        "reverse": (jax.grad(squared), 1.44),
        "forward": (lambda p, solver: jax.jvp(lambda p: squared(p, solver), (p,), (1.0,))[1], 1.44),
        "forward over reverse": (jax.hessian(squared), 8.64),
        "reverse over reverse": (jax.grad(jax.grad(squared)), 8.64),
    }
    if solver in ("neumann", "anderson", "phantom"):  # one rule derives every solve; Krylov solvers compile for long
        derivatives |= {
            "forward over forward": (jax.jacfwd(jax.jacfwd(squared)), 8.64),
            "reverse over both": (jax.grad(jax.hessian(squared)), 69.12),
        }
    found = jax.jit(lambda p: {name: fn(p, solver) for name, (fn, _) in derivatives.items()})(0.5)
    assert found == pytest.approx({name: expected for name, (_, expected) in derivatives.items()})


def transition(p, z, x, fire):
    hidden = fire("hidden", x @ p["in"] + z["a"] @ p["back"] + 0.4)
    return {
        "a": fire("a", hidden @ p["up"] + 0.4 * jnp.sin(z["b"]) @ p["cross"] + 0.3),
        "b": fire("b", z["a"] @ p["down"] + 0.3),
    }


def problem():
    rng = np.random.default_rng(1)
    sizes = {"in": (3, 5), "back": (4, 5), "up": (5, 4), "cross": (2, 4), "down": (4, 2)}
    params = {k: jnp.asarray(0.4 * rng.normal(size=s)) for k, s in sizes.items()}
    x = jnp.asarray(rng.uniform(0.2, 0.8, (2, 3)))
    return params, x, {"a": jnp.zeros((2, 4)), "b": jnp.zeros((2, 2))}


def loss(p, x, init, solver="neumann", **options):
    eq = mpisjax.equilibrium_forward(transition, p, x, init, forward=SOLVED, adjoint=tight(solver), **options)
    return sum(jnp.sum(jnp.sin(3 * r)) for r in jax.tree.leaves(eq.rates))


@pytest.mark.parametrize("solver", ["neumann", "bicgstab"])
def test_a_hessian_is_the_difference_of_gradients(x64, solver):
    p, x, init = problem()
    flat, unravel = ravel_pytree((p, x))

    def of(flat):
        return loss(*unravel(flat), init, solver)

    gradient = jax.jit(jax.grad(of))
    step = 1e-6
    expected = [
        (gradient(flat.at[i].add(step)) - gradient(flat.at[i].add(-step))) / (2 * step) for i in range(flat.size)
    ]
    found, again = jax.jit(lambda flat: (jax.hessian(of)(flat), jax.jacrev(jax.grad(of))(flat)))(flat)
    assert np.abs(found).max() > 1
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    np.testing.assert_allclose(again, found, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("forward", [SOLVED, SpikeForward(9)], ids=["rates", "spikes"])
def test_forward_mode_is_the_transpose_of_reverse_mode(x64, solver, forward):
    p, x, init = problem()

    def outputs(p, x):
        eq = mpisjax.equilibrium_forward(transition, p, x, init, forward=forward, adjoint=tight(solver))
        return eq.rates, eq.layer_rates

    rng = np.random.default_rng(3)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (p, x))
    shapes = jax.eval_shape(outputs, p, x)
    cotangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), shapes)

    @jax.jit
    def both(p, x):
        return jax.jvp(outputs, (p, x), tangents)[1], jax.vjp(outputs, p, x)[1](cotangents)

    along, back = both(p, x)

    def inner(a, b):
        return float(sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))

    assert inner(cotangents, along) == pytest.approx(inner(back, tangents), abs=1e-10)


def test_an_input_gradient_penalty_has_the_right_gradient(x64):
    p, x, init = problem()

    def penalty(p):
        return jnp.sum(jax.grad(loss, argnums=1)(p, x, init) ** 2)

    flat, unravel = ravel_pytree(p)
    whole = jax.jit(lambda flat: penalty(unravel(flat)))
    step = 1e-6
    expected = [(whole(flat.at[i].add(step)) - whole(flat.at[i].add(-step))) / (2 * step) for i in range(flat.size)]
    np.testing.assert_allclose(ravel_pytree(jax.jit(jax.grad(penalty))(p))[0], expected, atol=1e-5)


def hidden_and_out(p, z, x, fire):
    return fire("o", 0.4 * fire("h", 0.5 * z + p * x))


def test_what_comes_out_beside_the_rates_carries_the_whole_gradient(x64):
    """h = x p / (1 - 0.2): with x = 0.3 its slope in p is 0.375, of which one step alone has 0.3."""
    x = jnp.full((1, 1), 0.3)

    def step(p, z, x, fire):
        hidden = fire("h", 0.5 * z + p * x)
        return fire("o", 0.4 * hidden), {"hidden": hidden, "count": jnp.int32(3)}

    def run(p, **options):
        return mpisjax.equilibrium_forward(
            hidden_and_out, p, x, jnp.zeros((1, 1)), forward=SOLVED, adjoint=tight("neumann"), **options
        )

    assert run(1.0, step=step).aux["count"] == 3

    def read(p):
        eq = run(p)
        h, o, r = eq.layer_rates["h"].sum(), eq.layer_rates["o"].sum(), eq.rates.sum()
        return jnp.stack([run(p, step=step).aux["hidden"].sum(), h, o, r, r + h])

    for differentiate in (jax.jacrev, jax.jacfwd):
        slopes = jax.jit(differentiate(read))(1.0)
        np.testing.assert_allclose(slopes, [0.375, 0.375, 0.15, 0.15, 0.525], rtol=1e-6)
    assert jax.grad(lambda p: run(p).residual.sum())(1.0) == 0  # documented: no gradient


def test_layer_rates_are_those_of_the_equilibrium(x64):
    p, x, init = problem()
    eq = mpisjax.equilibrium_forward(transition, p, x, init, forward=SOLVED)
    assert set(eq.layer_rates) == {"hidden", "a", "b"}
    np.testing.assert_array_equal(eq.layer_rates["a"], eq.rates["a"])
    hidden = np.clip(x @ p["in"] + eq.rates["a"] @ p["back"] + 0.4, 0, 1)
    np.testing.assert_allclose(eq.layer_rates["hidden"], hidden, atol=1e-12)
