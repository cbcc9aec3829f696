"""Neurons: one LIF step, DBReLU, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax.neurons import RateReading, SpikeReading, dbrelu, population_shapes, resting_potentials

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("leak", [1.0, 0.5, 0.9])
@pytest.mark.parametrize("threshold", [1.0, 0.75])
def test_a_step_of_lif_neurons(leak, threshold):
    rng = np.random.default_rng(0)
    # Multiples of 1/8: exact in float32, and some potentials meet the threshold exactly.
    u = (rng.integers(-16, 17, size=(64, 8)) / 8).astype(np.float32)
    current = (rng.integers(-16, 17, size=(64, 8)) / 8).astype(np.float32)
    fire = SpikeReading(mpisjax.LIF(threshold, leak), {"a": jnp.asarray(u)})
    spikes = fire("a", jnp.asarray(current))

    integrated = u + current
    fired = integrated >= threshold
    assert (integrated == threshold).any(), "the case of a tie is not covered"
    np.testing.assert_array_equal(spikes, fired.astype(np.float32))
    np.testing.assert_array_equal(
        fire.potentials["a"], np.float32(leak) * (integrated - np.float32(threshold) * fired)
    )
    assert spikes.dtype == jnp.float32 and fire.activity["a"] is spikes


def test_half_precision_currents_keep_full_precision_potentials():
    neuron = mpisjax.IF()
    shapes = population_shapes(lambda z, fire: fire("a", z), jnp.zeros((2, 3), jnp.bfloat16))
    potentials = resting_potentials(neuron, shapes)
    assert shapes["a"].dtype == jnp.bfloat16 and potentials["a"].dtype == jnp.float32
    fire = SpikeReading(neuron, potentials)
    assert fire("a", jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert fire.potentials["a"].dtype == jnp.float32


def test_the_initial_potential_is_a_fraction_of_the_threshold():
    shapes = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    neuron = mpisjax.IF(threshold=4.0, initial_potential=0.5)
    np.testing.assert_array_equal(resting_potentials(neuron, shapes)["a"], [2.0, 2.0])


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
