"""Neurons: one LIF step, DBReLU, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import firing
from mpisjax.firing import RateReading
from mpisjax.neurons import dbrelu

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("leak", [1.0, 0.5, 0.9])
@pytest.mark.parametrize("threshold", [1.0, 0.75])
def test_a_step_of_lif_neurons(leak, threshold):
    rng = np.random.default_rng(0)
    # Multiples of 1/8: exact in float32 (but for a leak of 0.9), and some potentials meet the threshold exactly.
    state = (rng.integers(-16, 17, size=(64, 8)) / 8).astype(np.float32)
    current = (rng.integers(-16, 17, size=(64, 8)) / 8).astype(np.float32)
    neuron = mpisjax.LIF(threshold, leak)
    # The state is the potential before its reset.
    before = np.float32(leak) * (state - np.float32(threshold) * (state >= threshold))
    current[:, 0] = np.float32(threshold) - before[:, 0]
    state, spikes = neuron.step(jnp.asarray(state), jnp.asarray(current))

    integrated = before + current
    fired = integrated >= threshold
    assert (integrated == threshold).any(), "the case of a tie is not covered"
    np.testing.assert_array_equal(spikes, fired.astype(np.float32))
    np.testing.assert_array_equal(
        neuron.after_reset(state), np.float32(leak) * (integrated - np.float32(threshold) * fired)
    )
    assert spikes.dtype == jnp.float32


def test_half_precision_currents_keep_full_precision_potentials():
    neuron = mpisjax.IF()
    current = jnp.ones((2, 3), jnp.bfloat16)
    traced = firing.trace(lambda z, fire: fire("a", z), current)
    state = neuron.initial_state(traced.populations["a"])
    assert traced.populations["a"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    state, activity = neuron.step(state, current)
    assert activity.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_the_initial_potential_is_a_fraction_of_the_threshold():
    neuron = mpisjax.IF(threshold=4.0, initial_potential=0.5)
    state = neuron.initial_state(jax.ShapeDtypeStruct((2,), jnp.float32))
    np.testing.assert_array_equal(neuron.after_reset(state), [2.0, 2.0])


def test_dbrelu_value_and_gradient():
    u = jnp.array([-2.0, -1e-6, 0.0, 0.25, 1.0, 1.0 + 1e-6, 5.0])
    np.testing.assert_array_equal(dbrelu(u), np.clip(u, 0, 1))
    np.testing.assert_array_equal(jax.vmap(jax.grad(dbrelu))(u), [0, 0, 1, 1, 1, 0, 0])
    _, tangent = jax.jvp(dbrelu, (u,), (jnp.full(7, 3.0),))
    np.testing.assert_array_equal(tangent, [0, 0, 3, 3, 3, 0, 0])
    assert dbrelu(u.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_rate_reading_divides_by_the_threshold_once():
    fire = RateReading(mpisjax.LIF(threshold=4.0, leak=0.9))
    np.testing.assert_array_equal(fire("a", jnp.array([-1.0, 1.0, 2.0, 8.0])), [0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(jax.grad(lambda c: RateReading(fire.neuron)("a", c))(2.0), 0.25)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"threshold": 0.0}, "neuron.threshold"),
        ({"threshold": -1.0}, "neuron.threshold"),
        ({"threshold": float("nan")}, "neuron.threshold"),
        ({"leak": 0.0}, "neuron.leak"),
        ({"leak": 1.01}, "neuron.leak"),
        ({"leak": float("nan")}, "neuron.leak"),
        ({"initial_potential": 1.0}, "neuron.initial_potential"),
        ({"initial_potential": -0.1}, "neuron.initial_potential"),
    ],
)
def test_impossible_constants_are_refused(settings, named):
    with pytest.raises(mpisjax.UserError, match=named) as caught:
        mpisjax.LIF(**settings)
    assert str(next(iter(settings.values()))) in str(caught.value)


@pytest.mark.parametrize("forward", [mpisjax.SpikeForward(3), mpisjax.RateForward()])
def test_a_name_used_twice_is_refused(forward):
    def twice(p, z, x, fire):
        return fire("a", fire("a", x + z))

    with pytest.raises(mpisjax.UserError, match="'a'"):
        mpisjax.equilibrium_forward(twice, {}, jnp.zeros((1, 2)), jnp.zeros((1, 2)), forward=forward)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 30])
def test_a_start_at_half_the_threshold_halves_the_largest_error_of_a_rate(x64, num_steps):
    """Over all constant currents in [0, 1]: 1/(2T) against 1/T from rest."""
    current = jnp.linspace(0, 1, 4001)
    worst = {}
    for u0 in (0.5, 0.0):
        found = mpisjax.simulate(
            lambda p, z, x, fire: fire("o", x),
            {},
            current,
            jnp.zeros_like(current),
            neuron=mpisjax.IF(initial_potential=u0),
            forward=mpisjax.SpikeForward(num_steps),
        )
        worst[u0] = float(jnp.max(jnp.abs(found.rates - current)))
    assert mpisjax.IF() == mpisjax.IF(initial_potential=0.5) and mpisjax.LIF().initial_potential == 0.5
    assert worst[0.5] <= 1 / (2 * num_steps) + 1e-12
    assert worst[0.5] > 0.9 / (2 * num_steps) and worst[0.0] > 0.9 / num_steps


@dataclasses.dataclass(frozen=True)
class Doubling:
    """A user's own neuron: graded spikes of 0 or 2."""

    leak = 1.0

    def initial_state(self, current):
        return {"u": jnp.ones(current.shape, current.dtype)}

    def step(self, state, current):
        u = state["u"] + current
        spikes = 2 * (u >= 2).astype(u.dtype)
        return {"u": u - spikes}, spikes

    def rate(self, current):
        return jnp.clip(current, 0, 2)


KINDS = {
    "if": mpisjax.IF(0.7),
    "ternary": mpisjax.TernaryIF(0.7),
    "graded": mpisjax.GradedIF(3, 0.6),
    "own": Doubling(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_neuron_settles_at_its_rate_as_one_over_the_steps(x64, kind):
    """A fused network of two populations; ||f(r_T) - r_T|| falls with slope -1 in T."""
    rng = np.random.default_rng(5)
    p = {
        "in": rng.normal(size=(4, 16)),
        "back": 0.08 * rng.normal(size=(12, 16)),
        "out": 0.4 * rng.normal(size=(16, 12)),
    }
    x = jnp.asarray(rng.uniform(0.1, 0.7, (6, 4)))

    def transition(p, z, x, fire):
        return fire("out", fire("hidden", x @ p["in"] + z @ p["back"], KINDS[kind]) @ p["out"], KINDS[kind])

    steps, gaps = np.array([30, 100, 300, 1000]), []
    for num_steps in steps:
        eq = jax.jit(
            lambda p, T=num_steps: mpisjax.equilibrium_forward(
                transition, p, x, jnp.zeros((6, 12)), forward=mpisjax.SpikeForward(int(T))
            )
        )(p)
        gaps.append(float(jnp.mean(eq.residual)))
    slope = np.polyfit(np.log(steps), np.log(gaps), 1)[0]
    assert -1.25 < slope < -0.8 and gaps[-1] < 0.02, (slope, gaps)
    if kind != "if":
        assert np.abs(eq.rates).max() > (0.2 if kind == "ternary" else 1.01)
    if kind == "ternary":
        assert eq.rates.min() < -0.2


@pytest.mark.parametrize("kind", ["if", "ternary", "graded"])
def test_thresholds_are_trained_by_channel_through_the_rate(x64, kind):
    rng = np.random.default_rng(0)
    x, back = jnp.asarray(rng.uniform(0.2, 0.9, (3, 4))), 0.3 * rng.normal(size=(4, 4))
    make = {"if": mpisjax.IF, "ternary": mpisjax.TernaryIF, "graded": lambda t: mpisjax.GradedIF(2, t)}[kind]

    def rates(threshold, forward):
        return mpisjax.equilibrium_forward(
            lambda p, z, x, fire: fire("o", x + z @ back, make(p)),
            threshold,
            x,
            jnp.zeros((3, 4)),
            forward=forward,
            adjoint=mpisjax.Adjoint(max_steps=300, tol=1e-12),
            returns="spikes",
        ).rates

    exact = mpisjax.RateForward(max_steps=500, tol=1e-13)

    def loss(threshold):
        return jnp.sum(rates(threshold, exact) ** 2)

    threshold = jnp.asarray([0.9, 1.1, 1.4, 2.0])
    found = jax.grad(loss)(threshold)
    for i in range(4):
        step = jnp.zeros(4).at[i].set(1e-6)
        assert float(found[i]) == pytest.approx(float(loss(threshold + step) - loss(threshold - step)) / 2e-6, abs=1e-5)
    # The simulation has the same thresholds.
    spiking = rates(threshold, mpisjax.SpikeForward(4000))
    np.testing.assert_allclose(spiking, rates(threshold, exact), atol=2e-3)
    # So has a network's default neuron.
    whole = mpisjax.equilibrium_forward(
        lambda p, z, x, fire: fire("o", x + z @ back),
        {},
        x,
        jnp.zeros((3, 4)),
        neuron=make(threshold),
        forward=exact,
    )
    np.testing.assert_allclose(whole.rates, rates(threshold, exact), atol=1e-10)


def test_a_leak_or_an_initial_potential_that_is_traced_is_refused():
    for name in ("leak", "initial_potential"):
        with pytest.raises(mpisjax.UserError, match=f"neuron.{name} is traced"):
            jax.grad(lambda v, name=name: mpisjax.LIF(**{name: v}).rate(jnp.float32(1)))(0.5)
