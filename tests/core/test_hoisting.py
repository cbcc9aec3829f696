"""Moving what does not change out of loops, and cutting derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax.hoisting import detach, hoist

pytestmark = pytest.mark.unoptimized


def primitives(jaxpr) -> list[str]:
    """The names of all primitives in a jaxpr, the nested ones' too."""
    names = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        names.append(eqn.primitive.name)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                names += primitives(value)
    return names


def loop_bodies(jaxpr) -> list:
    """The bodies of every `scan` and `while_loop` in a jaxpr, outermost first."""
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "scan":
            found.append(eqn.params["jaxpr"])
        elif eqn.primitive.name == "while":
            found.append(eqn.params["body_jaxpr"])
        elif eqn.primitive.name == "custom_linear_solve":
            found += loop_bodies(eqn.params["jaxprs"].solve)  # the only one that is compiled
        else:
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    found += loop_bodies(value)
    return found


def test_hoisting_keeps_the_function_and_takes_the_fixed_part_out():
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(4, 4))), jnp.asarray(rng.normal(size=(2, 4)))

    def f(z, pair):
        fixed = jnp.tanh(x @ w)
        return {"a": fixed + z @ w, "b": (pair[0] * jnp.exp(fixed), fixed, 3.0)}

    z, pair = jnp.ones((2, 4)), (jnp.full((2, 4), 2.0),)
    loop_fn, constants = hoist(f, z, pair)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loop_fn(constants, z, pair), f(z, pair))
    inner = primitives(jax.make_jaxpr(lambda c: loop_fn(c, z, pair))(constants))
    assert inner.count("dot_general") == 1 and "tanh" not in inner and "exp" not in inner
    assert primitives(jax.make_jaxpr(f)(z, pair)).count("dot_general") == 2


def test_hoisted_constants_carry_derivatives():
    def total(w, hoisted):
        def f(z):
            return z * jnp.exp(w) + w**2

        if not hoisted:
            return f(jnp.float32(3.0))
        loop_fn, constants = hoist(f, jnp.float32(0.0))
        return loop_fn(constants, jnp.float32(3.0))

    for differentiate in (jax.grad, jax.jacfwd):
        assert differentiate(total)(0.5, True) == pytest.approx(differentiate(total)(0.5, False))


def test_hoisting_what_is_all_fixed_or_all_varying():
    w = jnp.arange(3.0)
    for f in (lambda z: z, lambda z: w, lambda z: jnp.sin(w), lambda z: (2.0, z), lambda z: jnp.ones(3)):
        loop_fn, constants = hoist(f, w)
        jax.tree.map(np.testing.assert_array_equal, loop_fn(constants, w + 1), f(w + 1))


def test_detaching_cuts_arguments_and_what_is_closed_over():
    def f(w, x, cut):
        def inner(x):
            return {"y": jnp.sin(w) * x, "z": w}

        return sum(jax.tree.leaves(detach(inner, x) if cut else inner(x)))

    assert f(0.3, 2.0, True) == pytest.approx(f(0.3, 2.0, False))
    assert jax.grad(f, argnums=(0, 1))(0.3, 2.0, True) == (0, 0)
    assert jax.grad(f, argnums=(0, 1))(0.3, 2.0, False) != (0, 0)


def transition(p, z, x, fire):
    return fire("a", jnp.tanh(x @ p["in"]) @ p["mix"] + z @ (p["back"] / jnp.linalg.norm(p["back"])))


@pytest.mark.parametrize(
    "forward",
    [mpisjax.SpikeForward(5), mpisjax.SpikeForward(5, tol=0.1), mpisjax.RateForward()],
    ids=["spikes", "early stop", "rates"],
)
def test_the_constant_input_is_worked_on_once_whatever_the_loop(forward):
    rng = np.random.default_rng(0)
    p = {k: jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for k in ("in", "mix", "back")}
    args = (p, jnp.ones((2, 3)), jnp.zeros((2, 3)))

    def loss(p, x, z):
        return mpisjax.equilibrium_forward(transition, p, x, z, forward=forward).rates.sum()

    bodies = loop_bodies(jax.make_jaxpr(jax.value_and_grad(loss))(*args))
    assert len(bodies) == 2  # the forward solve and the adjoint solve
    for body in bodies:
        inner = primitives(body)
        assert inner.count("dot_general") == 1, inner
        assert not {"tanh", "sqrt"} & set(primitives(bodies[0])) - (
            {"sqrt"} if getattr(forward, "tol", None) else set()  # the stopping rule takes norms
        )


def test_frames_are_worked_on_at_every_step():
    p = {k: jnp.ones((3, 3)) for k in ("in", "mix", "back")}
    (body,) = loop_bodies(
        jax.make_jaxpr(
            lambda x: (
                mpisjax.simulate(
                    transition,
                    p,
                    x,
                    jnp.zeros((2, 3)),
                    neuron=mpisjax.IF(),
                    forward=mpisjax.SpikeForward(None),
                    time_axis=0,
                ).rates
            )
        )(jnp.ones((4, 2, 3)))
    )
    inner = primitives(body)
    assert inner.count("dot_general") == 3 and "tanh" in inner and "sqrt" not in inner
