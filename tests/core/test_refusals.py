"""What does not fit together is refused in a sentence that says what to do, at trace time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import Adjoint, RateForward, SpikeForward

pytestmark = pytest.mark.unoptimized
X, INIT = jnp.full((2, 3), 0.3), jnp.zeros((2, 3))


def plain(p, z, x, fire):
    return fire("o", x + 0.5 * z)


def unused(p, z, x, fire):
    fire("o", x)
    return 0.5 * z + x


class Dense(nn.Module):
    @nn.compact
    def __call__(self, z, x, fire):
        return fire("o", nn.Dense(3)(x) + z)


CASES = {
    "no fire": (lambda p, z, x, fire: 0.5 * z - x, {}, "never calls fire"),
    "not from fire": (unused, {}, "without calling fire"),
    "one stream not from fire": (
        lambda p, z, x, fire: {"a": fire("a", x), "b": z["b"] * 0.5 + x},
        {"init": {"a": INIT, "b": INIT}},
        r"\['b'\] without calling fire",
    ),
    "an empty batch": (plain, {"x": X[:0], "init": INIT[:0]}, "at least one sample"),
    "no neurons": (plain, {"x": X[:, :0], "init": INIT[:, :0]}, "at least one sample and one neuron"),
    "a population without neurons": (
        lambda p, z, x, fire: fire("o", x + z + fire("none", x[:, :0]).sum()),
        {},
        "'none' has a current of shape",
    ),
    "no frames": (
        plain,
        {"x": jnp.zeros((0, 2, 3)), "time_axis": 0, "forward": SpikeForward(None)},
        "0 frames",
    ),
    "a wrong batch axis": (plain, {"batch_axis": 5, "forward": RateForward()}, "batch_axis is 5"),
    "forward by name": (plain, {"forward": "picard"}, "RateForward"),
    "forward's class": (plain, {"forward": RateForward}, "forward is RateForward: pass an instance"),
    "adjoint's class": (plain, {"adjoint": Adjoint}, "adjoint is Adjoint: pass an instance"),
    "neuron's class": (plain, {"neuron": mpisjax.LIF}, "pass an instance"),
    "neuron by name": (plain, {"neuron": "lif"}, "neuron is 'lif'"),
    "a population's neuron by name": (
        lambda p, z, x, fire: fire("o", x + z, "lif"),
        {},
        "'lif' for a neuron",
    ),
    "a module": (Dense(), {}, r"\.apply"),
    "fire the wrong way round": (lambda p, z, x, fire: fire(x + z, "o"), {}, "in that order"),
    "a current that is none": (lambda p, z, x, fire: fire("o", "x"), {}, "give it an array"),
    "an integer current": (lambda p, z, x, fire: fire("o", jnp.ones((2, 3), int)), {}, "make it a float"),
    "a list for a tuple": (
        lambda p, z, x, fire: (fire("a", x), fire("b", x)),
        {"init": [INIT, INIT]},
        r"PyTreeDef\(\(\*, \*\)\) but init is of structure PyTreeDef\(\[\*, \*\]\)",
    ),
    "no rates": (lambda p, z, x, fire: (), {"init": ()}, "init holds no arrays"),
    "integer rates": (plain, {"init": jnp.zeros((2, 3), int)}, "rates are floats"),
    "a step of another shape": (
        plain,
        {"step": lambda p, z, x, fire: (fire("o", x + z)[:, :2], None)},
        "the step returns rates",
    ),
    "a threshold that does not fit": (
        lambda p, z, x, fire: fire("o", x + z, mpisjax.LIF(jnp.ones(4))),
        {},
        "one value a channel",
    ),
    "batches of two sizes": (
        lambda p, z, x, fire: {"a": fire("a", x + z["a"]), "b": fire("b", x[:1] + z["b"])},
        {"init": {"a": INIT, "b": INIT[:1]}},
        r"\[1, 2\] samples",
    ),
    "indices over time": (
        lambda p, z, x, fire: fire("o", p[x] + z),
        {
            "params": jnp.ones((7, 3)),
            "x": jnp.zeros((4, 2), jnp.int32),
            "time_axis": 0,
            "forward": RateForward(),
        },
        "indices and have no mean",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_a_sentence(case):
    transition, options, named = CASES[case]
    options = {"params": {}, "x": X, "init": INIT, **options}
    with pytest.raises(mpisjax.UserError, match=named) as caught:
        mpisjax.equilibrium_forward(transition, options.pop("params"), options.pop("x"), options.pop("init"), **options)
    assert "\n" not in str(caught.value)


def test_a_simulation_refuses_rates_unlike_init():
    with pytest.raises(mpisjax.UserError, match=r"rates: float(32|64)\[2, 3\].* but init is .*bfloat16\[2, 3\]"):
        mpisjax.simulate(
            lambda p, z, x, fire: fire("o", x),
            {},
            X,
            INIT.astype(jnp.bfloat16),
            neuron=mpisjax.IF(),
            forward=SpikeForward(2),
        )


def test_rates_that_are_handed_on_from_the_step_before_are_accepted():
    def delayed(p, z, x, fire):
        return {"out": fire("o", x + 0.4 * z["before"]), "before": z["out"]}

    eq = mpisjax.equilibrium_forward(
        delayed, {}, X, {"out": INIT, "before": INIT}, forward=RateForward(max_steps=100, tol=1e-6)
    )
    np.testing.assert_allclose(eq.rates["out"], 0.3 / 0.6, rtol=1e-4)


def test_what_is_no_array_in_params_is_handed_on():
    """Functions, Python numbers and strings, as an Equinox module holds them; NumPy's arrays as `init`."""
    params = {"w": jnp.full((3, 3), 0.2), "act": jnp.tanh, "times": 2, "name": "net"}

    def transition(p, z, x, fire):
        assert p["name"] == "net" and isinstance(p["times"], int)
        for _ in range(p["times"]):
            x = p["act"](x)
        return fire("o", x + z @ p["w"])

    def loss(w):
        eq = mpisjax.equilibrium_forward(
            transition, {**params, "w": w}, np.asarray(X), np.zeros((2, 3)), forward=RateForward()
        )
        return eq.rates.sum()

    assert np.isfinite(jax.grad(loss)(params["w"])).all()


def test_both_readings_see_the_same_numbers_in_frames_of_small_integers():
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 200, (6, 2, 3)), jnp.uint8)

    def summed(p, z, x, fire):
        return fire("o", (x + x) * 0.001 + 0.1 * z)  # as uint8 this wraps around

    for forward in (SpikeForward(None), RateForward(max_steps=100, tol=1e-7)):
        found, expected = (
            mpisjax.equilibrium_forward(summed, {}, x, INIT, time_axis=0, forward=forward, returns="spikes").rates
            for x in (frames, frames.astype(jnp.float32))
        )
        np.testing.assert_array_equal(found, expected)
        assert np.any(found)


def test_constant_indices_are_kept_as_they_are():
    tokens = jnp.asarray([[0, 2], [1, 1]])

    def embedded(p, z, x, fire):
        assert jnp.issubdtype(x.dtype, jnp.integer)
        return fire("o", p[x].sum(1) + 0.1 * z)

    for forward in (SpikeForward(5), RateForward()):
        eq = mpisjax.equilibrium_forward(embedded, jnp.full((4, 3), 0.2), tokens, INIT, forward=forward)
        assert np.any(eq.rates)


def test_a_silent_sample_does_not_rule_the_mean_residual():
    """Driven off by its own feedback: f(r) is zero and r is not. The residual is 1, not millions."""
    eq = mpisjax.equilibrium_forward(
        lambda p, z, x, fire: fire("o", x - 5 * z),
        {},
        X,
        INIT + 0.5,
        forward=RateForward(max_steps=1, tol=0.0),
    )
    np.testing.assert_allclose(eq.rates, 0.3, rtol=1e-6)  # f(0)
    from mpisjax.residuals import relative_residual

    np.testing.assert_array_equal(relative_residual(INIT, INIT + 0.5), 1)
    np.testing.assert_array_equal(relative_residual(INIT, INIT), 0)
    assert np.isnan(relative_residual(INIT, INIT * np.nan)).all()
