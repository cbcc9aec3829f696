"""Neurons: one LIF step, DBReLU, what is refused."""

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
