"""Convergence curves, spectral radius, Jacobian penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import configuration, data, nn
from mpisjax.analysis.dynamics import convergence
from mpisjax.configuration import makers, rules
from mpisjax.jacobian import jacobian_penalty, spectral_radius, warn_near_one

pytestmark = pytest.mark.unoptimized


def transition(p, z, x, fire):
    return {"a": fire("a", x + z["a"] @ p["aa"] + z["b"] @ p["ba"]), "b": fire("b", 0.3 + z["a"] @ p["ab"])}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"aa": rng.normal(size=(6, 6)), "ba": rng.normal(size=(4, 6)), "ab": rng.normal(size=(6, 4))}
    params = jax.tree.map(lambda a: jnp.asarray(0.2 * a, jnp.float32), params)
    init = {"a": jnp.zeros((3, 6)), "b": jnp.zeros((3, 4))}
    return params, jnp.asarray(rng.uniform(0.1, 0.6, size=(3, 6)), jnp.float32), init


@pytest.mark.parametrize("leak", [1.0, 0.9])
@pytest.mark.parametrize("temporal", [False, True])
def test_curves_are_the_differences_of_separate_simulations(problem, leak, temporal):
    params, x, init = problem
    neuron, steps = mpisjax.LIF(1.0, leak), 6
    frames = jnp.stack([x * (0.5 + 0.2 * t) for t in range(steps)])
    curves = convergence(
        transition,
        params,
        frames if temporal else x,
        init,
        neuron=neuron,
        num_steps=steps,
        time_axis=0 if temporal else None,
    )
    previous = init
    for t in range(1, steps + 1):
        inputs = frames[:t] if temporal else x
        rates = mpisjax.simulate(
            transition,
            params,
            inputs,
            init,
            neuron=neuron,
            forward=mpisjax.SpikeForward(t),
            time_axis=0 if temporal else None,
        ).rates
        weights = leak ** np.arange(t - 1, -1, -1)
        mean = jnp.tensordot(weights / weights.sum(), frames[:t], 1) if temporal else x
        stepped = transition(params, rates, mean, lambda name, u: jnp.clip(u, 0, 1))
        for k in init:
            np.testing.assert_allclose(
                curves.change[k][t - 1], jnp.linalg.norm(rates[k] - previous[k], axis=1), atol=1e-5
            )
            np.testing.assert_allclose(
                curves.residual[k][t - 1], jnp.linalg.norm(stepped[k] - rates[k], axis=1), atol=1e-5
            )
        previous = rates
    assert curves.residual["a"].shape == (steps, 3)


def test_spectral_radius_of_known_maps():
    # Complex leading eigenvalues of modulus 0.9, in one sample; a silent map in the other.
    angle = 1.1
    matrix = np.zeros((5, 5))
    matrix[:2, :2] = 0.9 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[2:, 2:] = np.diag([0.5, 0.3, 0.1])
    basis = np.random.default_rng(0).normal(size=(5, 5))
    similar = jnp.asarray(basis @ matrix @ np.linalg.inv(basis), jnp.float32)
    gain = jnp.array([1.0, 0.0])[:, None]
    radius = spectral_radius(lambda r: {"z": gain * (r["z"] @ similar)}, {"z": jnp.zeros((2, 5))}, jax.random.key(0))
    np.testing.assert_allclose(radius.value, [0.9, 0.0], atol=0.01)
    assert (radius.error <= 0.01).all() and radius.num_steps[1] < radius.num_steps[0]


def test_a_spectral_radius_that_has_not_settled_says_so():
    """Two leading eigenvalues of almost one size, 0.9 and 0.89: forty products are too few to tell them apart."""
    matrix = jnp.diag(jnp.array([0.9, 0.89, 0.1]))
    short, full = (
        spectral_radius(lambda r: r @ matrix, jnp.zeros((1, 3)), jax.random.key(3), tol=1e-4, max_steps=n)
        for n in (20, 5000)
    )
    assert short.error[0] > 1e-4 and full.error[0] <= 1e-4
    assert abs(full.value[0] - 0.9) < abs(short.value[0] - 0.9) < 0.05 and abs(full.value[0] - 0.9) < 1e-3


def test_spectral_radius_of_a_network_is_numpy_s(problem):
    params, x, init = problem

    def f(r):
        return transition(params, r, x, lambda name, u: mpisjax.dbrelu(u))

    rates = init
    for _ in range(60):
        rates = f(rates)
    jacobian = jax.jacrev(lambda r: jnp.concatenate(list(f(r).values()), 1).sum(0))(rates)
    whole = np.concatenate([np.asarray(jacobian[k]) for k in ("a", "b")], axis=2)  # [out, sample, in]
    expected = [np.abs(np.linalg.eigvals(whole[:, i])).max() for i in range(3)]
    found = spectral_radius(f, rates, jax.random.key(1))
    np.testing.assert_allclose(found.value, expected, rtol=0.02)


def test_warning_names_the_share_and_the_remedy(caplog):
    assert warn_near_one([0.3, 0.5]) is None and not caplog.records
    message = warn_near_one([0.3, 0.97, 1.2, 0.1])
    assert message and "50.0%" in message and "1.200" in message and "train.jacobian_penalty" in message
    assert caplog.records


def test_penalty_is_the_frobenius_norm_in_the_mean_and_differentiable(problem):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    rates = jnp.zeros((2, 5))

    def penalty(matrix, key):
        return jacobian_penalty(lambda r: r @ matrix, rates, key)

    keys = jax.random.split(jax.random.key(0), 4000)
    value, gradient = jax.vmap(jax.value_and_grad(penalty), (None, 0))(matrix, keys)
    np.testing.assert_allclose(value.mean(), jnp.sum(matrix**2) / 5, rtol=0.05)
    np.testing.assert_allclose(gradient.mean(0), 2 * matrix / 5, atol=0.06)


@pytest.mark.slow
def test_penalty_in_training_makes_the_jacobian_smaller():
    def trained(weight):
        config = configuration.base()
        config.model.update({"stem": (4,), "layers": (6, 8), "num_streams": 1, "fusion_layer": 1})
        config.train.update({"batch_size": 30, "warmup_epochs": 0.0, "jacobian_penalty": weight})
        config.forward.update({"mode": "rates", "max_steps": 4})
        config.adjoint.max_steps = 3
        rules.check(config)
        dataset = makers.make_dataset(config)
        net = makers.make_network(config, dataset)
        batch = data.Feed(dataset.train, 30, seed=0).batch(0)
        images = data.prepare_images(batch.images, dataset)
        neuron = makers.make_neuron(config)
        variables = nn.init_variables(net, jax.random.key(0), images, neuron)
        train = makers.make_train_step(config, net, dataset, steps_per_epoch=20)
        current = makers.init_state(config, variables, 20)
        for _ in range(10):
            current, metrics = train(current, batch)
        variables = {"params": current.params, "batch_stats": current.batch_stats}
        x = net.apply(variables, images, False, method="encode")
        reading = mpisjax.firing.RateReading
        f = lambda r: nn.transition_of(net)(variables, r, x, reading(neuron))  # noqa: E731
        rates = f(f(f(net.initial_rates(images))))
        return float(jacobian_penalty(f, rates, jax.random.key(5))), metrics

    without, _ = trained(0.0)
    penalised, metrics = trained(20.0)
    assert penalised < 0.7 * without
    assert int(metrics.finite) == 1
