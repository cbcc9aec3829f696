"""Feedback divided by its operator norm: against NumPy's singular values, in the network and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import configuration, nn
from mpisjax.configuration import makers, rules
from mpisjax.hoisting import hoist
from mpisjax.nn.convolution import conv_transpose2d
from mpisjax.nn.spectral import SpectralConvTranspose, operator_norm

pytestmark = pytest.mark.unoptimized


def dense(kernel, stride, small, size):
    """The transposed convolution as a matrix: [outputs, inputs]."""
    inputs = np.eye(small[0] * small[1] * kernel.shape[-1]).reshape(-1, *small, kernel.shape[-1])
    images = conv_transpose2d(jnp.asarray(inputs, kernel.dtype), kernel, stride, size)
    return np.asarray(images, np.float64).reshape(len(inputs), -1).T


@pytest.mark.parametrize("stride, small, size", [(1, (5, 4), (5, 4)), (2, (3, 4), (5, 8)), (2, (4, 4), (7, 7))])
def test_norm_and_its_gradient_are_those_of_numpy_s_singular_values(x64, stride, small, size):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)))
    start = jnp.asarray(rng.normal(size=(1, *small, 4)))

    def norm(kernel):
        return operator_norm(kernel, start, stride, size, iterations=3000)[0]

    found, gradient = jax.value_and_grad(norm)(kernel)
    expected = np.linalg.norm(dense(kernel, stride, small, size), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    direction, step = jnp.asarray(rng.normal(size=kernel.shape)), 1e-5

    def moved(by):
        return np.linalg.norm(dense(kernel + by * direction, stride, small, size), 2)

    difference = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-5)
    # The matrix of a single pixel's image, which others divide by, is not the norm.
    assert np.linalg.norm(np.asarray(kernel).transpose(3, 0, 1, 2).reshape(4, -1), 2) < 0.95 * expected


def test_layer_amplifies_by_its_gain_and_not_more():
    layer = SpectralConvTranspose(4, stride=2, initial_gain=0.5)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 6))
    variables = jax.jit(lambda key: layer.init(key, x, True, (7, 7)))(jax.random.key(0))

    def singular(variables):
        inputs = jnp.eye(96).reshape(-1, 4, 4, 6)
        return np.linalg.norm(np.asarray(layer.apply(variables, inputs, False, (7, 7))).reshape(96, -1), 2)

    assert singular(variables) == pytest.approx(0.5, rel=0.01)
    variables["params"]["gain"] = jnp.asarray(50.0)  # whatever training makes of it
    assert singular(variables) == pytest.approx(1, rel=0.02)


def ide_net(**settings):
    return nn.MPIS(3, stem=(4,), layers=(6, 8, 8), fusion_layer=1, num_streams=1, feedback_norm="spectral", **settings)


def test_norm_is_computed_once_a_solve_and_not_in_the_loop():
    net = ide_net(head="smallest")
    images = jax.random.uniform(jax.random.key(1), (2, 9, 9, 1))
    variables = jax.jit(lambda k: nn.init_variables(net, k, images, mpisjax.IF()))(jax.random.key(0))
    x = net.apply(variables, images, False, method="encode")
    rates = net.initial_rates(images)

    def f(rates):
        return nn.transition_of(net)(variables, rates, x, mpisjax.firing.RateReading(mpisjax.IF()))

    loop, constants = hoist(f, rates)
    inside = str(jax.make_jaxpr(lambda r: loop(constants, r))(rates))
    whole = str(jax.make_jaxpr(f)(rates))
    assert inside.count("conv_general_dilated[") == 3  # two layers and the feedback; the injection is constant
    assert "while" not in inside and "scan" not in inside and "tanh" not in inside
    assert "scan" in whole and "tanh" in whole


def test_gradient_through_the_bounded_feedback_is_that_of_differences(x64):
    """From a converged direction the norm is the true one, so that the whole weight has a smooth derivative."""
    layer = SpectralConvTranspose(4, stride=2)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 3, 5)))
    variables = jax.jit(lambda key: layer.init(key, x, True, (6, 6)))(jax.random.key(0))
    params, direction = variables["params"], variables["batch_stats"]["direction"]

    @jax.jit
    def loss(params):
        _, found = operator_norm(params["kernel"], direction, 2, (6, 6), 1000)
        return jnp.sum(layer.apply({"params": params, "batch_stats": {"direction": found}}, x, False, (6, 6)) ** 3)

    gradient = jax.jit(jax.grad(loss))(params)
    for name in ("kernel", "gain"):
        towards = jnp.asarray(np.random.default_rng(1).normal(size=params[name].shape))
        there, back = ({**params, name: params[name] + by * towards} for by in (1e-5, -1e-5))
        difference = (loss(there) - loss(back)) / 2e-5
        assert abs(float(difference)) > 1e-3
        np.testing.assert_allclose(jnp.sum(gradient[name] * towards), difference, rtol=1e-5)


def test_a_config_switch_trains_it_and_the_direction_follows_the_weights():
    from mpisjax import data

    config = configuration.base()
    config.model.update(stem=(4,), layers=(6, 8), num_streams=1, fusion_layer=1, feedback_norm="spectral")
    config.forward.update(mode="rates", max_steps=5)
    config.train.update(batch_size=30, warmup_epochs=0.0)
    rules.check(config)
    dataset = makers.make_dataset(config)
    net = makers.make_network(config, dataset)
    batch = data.Feed(dataset.train, 30, seed=0).batch(0)
    images = data.prepare_images(batch.images, dataset)
    init = jax.jit(lambda key: nn.init_variables(net, key, images[:1], makers.make_neuron(config)))
    variables = init(jax.random.key(0))
    before = np.array(variables["params"]["trans_0"]["kernel"])  # the step takes the buffers
    train = makers.make_train_step(config, net, dataset, steps_per_epoch=20)
    trained = makers.init_state(config, variables, 20)
    losses = []
    for _ in range(12):
        trained, metrics = train(trained, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.6 * losses[0], losses
    kernel, direction = trained.params["trans_0"]["kernel"], trained.batch_stats["trans_0"]["direction"]
    assert float(jnp.abs(kernel - before).max()) > 1e-3
    tracked, _ = operator_norm(kernel, direction, 2, (8, 8))
    assert tracked == pytest.approx(np.linalg.norm(dense(kernel, 2, (4, 4), (8, 8)), 2), rel=0.02)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"feedback_norm": "batch"}, "model.feedback_norm"),
        ({"feedback_norm": "spectral", "feedback_gain": 1.0}, "gain"),
    ],
)
def test_impossible_settings_are_named(settings, word):
    with pytest.raises(mpisjax.UserError, match=word):
        nn.MPIS(3, **settings)
