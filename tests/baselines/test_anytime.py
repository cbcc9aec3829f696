"""One simulation read after several numbers of steps: its values and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import configuration, data, nn
from mpisjax.baselines import anytime
from mpisjax.baselines.anytime import rates_after
from mpisjax.baselines.bptt import BPTT, unroll
from mpisjax.configuration import config_files, makers, rules
from mpisjax.errors import UserError
from mpisjax.neurons import dbrelu
from mpisjax.storage.preemption import Stopper
from mpisjax.training import run

pytestmark = pytest.mark.unoptimized
TIMES = (1, 2, 4, 7)


def transition(p, z, x, fire):
    return fire("out", fire("hidden", x @ p["in"] + z @ p["back"]) @ p["out"])


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    sizes = {"in": (5, 8), "back": (6, 8), "out": (8, 6)}
    params = {k: jnp.asarray(rng.normal(size=s) * 0.6, jnp.float32) for k, s in sizes.items()}
    return params, jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jnp.zeros((4, 6))


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_rates_are_those_of_simulations_of_each_length(problem, leak):
    neuron = mpisjax.LIF(0.8, leak, 0.5)
    found = rates_after(transition, *problem, neuron=neuron, times=TIMES)
    assert len(found) == len(TIMES)
    for steps, rates in zip(TIMES, found, strict=True):
        alone = mpisjax.simulate(transition, *problem, neuron=neuron, forward=mpisjax.SpikeForward(steps))
        np.testing.assert_allclose(rates, alone.rates, rtol=1e-6, atol=1e-7)
    assert len({np.asarray(r).tobytes() for r in found}) == len(TIMES)


def test_gradient_of_the_mean_is_the_mean_of_the_gradients_of_each_length(problem):
    params, x, init = problem
    neuron = mpisjax.LIF(0.8, 1.0, 0.5)
    target = jnp.asarray(np.random.default_rng(1).uniform(size=init.shape), jnp.float32)

    def together(p, remat=False):
        found = rates_after(transition, p, x, init, neuron=neuron, times=TIMES, remat=remat)
        return sum(jnp.sum((r - target) ** 2) for r in found) / len(TIMES)

    def alone(p, steps):
        found = unroll(transition, p, x, init, neuron=neuron, num_steps=steps, bptt=BPTT("triangular"))
        return jnp.sum((found.rates - target) ** 2)

    each = [jax.jit(jax.grad(alone), static_argnums=1)(params, steps) for steps in TIMES]
    wanted = jax.tree.map(lambda *g: sum(g) / len(TIMES), *each)
    for name, grad in jax.jit(jax.grad(together))(params).items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-4, atol=1e-5)
        assert np.abs(grad).max() > 1e-3
    again = jax.jit(jax.grad(lambda p: together(p, remat=True)))(params)
    for name, grad in again.items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_steps_are_computed_again_where_memory_is_to_be_saved():
    config, net, dataset, batch, trained = small_run(times=(1, 8))

    def bytes_kept(remat):
        config.bptt.remat = remat
        step = makers.make_train_step(config, net, dataset, steps_per_epoch=20)
        return step.lower(trained, batch).compile().memory_analysis().temp_size_in_bytes

    assert bytes_kept(True) < 0.8 * bytes_kept(False)


def test_one_step_from_half_the_threshold_is_a_rounding_passed_straight_through():
    currents = jnp.asarray(np.random.default_rng(2).uniform(-0.5, 1.5, (1, 50)), jnp.float32)

    def one(fire_name):
        return lambda p, z, x, fire: fire(fire_name, x * p)

    def spikes(x):
        (rates,) = rates_after(
            one("a"),
            1.0,
            x,
            jnp.zeros_like(x),
            neuron=mpisjax.LIF(1.0, 1.0, 0.5),
            times=(1,),
            surrogate="rectangular",
        )
        return rates

    np.testing.assert_array_equal(spikes(currents), jnp.floor(jnp.clip(currents, 0, 1) + 0.5))
    slope = jax.grad(lambda x: spikes(x).sum())(currents)
    np.testing.assert_array_equal(slope, jax.grad(lambda x: dbrelu(x).sum())(currents))


@pytest.mark.parametrize("times", [(), (0, 1), (2, 1), (1, 1)])
def test_refuses_times_that_do_not_rise(problem, times):
    with pytest.raises(UserError, match="rising"):
        rates_after(transition, *problem, neuron=mpisjax.IF(), times=times)


def small_run(**bptt):
    config = configuration.base()
    config.model.update({"stem": (4,), "layers": (6, 8), "num_streams": 1, "fusion_layer": 1})
    config.train.update({"method": "bptt", "batch_size": 30, "warmup_epochs": 0.0})
    config.neuron.initial_potential = 0.5
    config.forward.num_steps = 4
    config.bptt.update(bptt)
    rules.check(config)
    dataset = makers.make_dataset(config)
    net = makers.make_network(config, dataset)
    batch = data.Feed(dataset.train, 30, seed=0).batch(0)
    images = data.prepare_images(batch.images, dataset)
    neuron = makers.make_neuron(config)
    variables = jax.jit(lambda images: nn.init_variables(net, jax.random.key(0), images, neuron))(images)
    trained = makers.init_state(config, variables, 20)
    return config, net, dataset, batch, trained


def test_training_step_lowers_the_mean_loss_and_leaves_the_statistics():
    config, net, dataset, batch, trained = small_run(times=(1, 2, 4))
    train = makers.make_train_step(config, net, dataset, steps_per_epoch=20)
    before = jax.tree.map(np.asarray, trained.batch_stats)
    images = data.prepare_images(batch.images, dataset)
    variables, neuron = {"params": trained.params, "batch_stats": trained.batch_stats}, makers.make_neuron(config)
    out = jax.eval_shape(lambda v, x: anytime.apply(net, v, x, neuron=neuron, times=(1, 2, 4)), variables, images)
    assert out.logits.shape == (3, 30, 10)
    losses = []
    for _ in range(12):
        trained, metrics = train(trained, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0], losses  # slow from random weights: the statistics are not theirs
    assert int(metrics.forward_steps) == 4 and int(metrics.finite) == 1
    jax.tree.map(np.testing.assert_array_equal, trained.batch_stats, before)


def test_logits_are_those_of_evaluation_at_each_time():
    config, net, dataset, batch, trained = small_run(times=(1, 3))
    images, neuron = data.prepare_images(batch.images, dataset), makers.make_neuron(config)
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    out = jax.jit(lambda v, x: anytime.apply(net, v, x, neuron=neuron, times=(1, 3)))(variables, images)
    for steps, logits in zip((1, 3), out.logits, strict=True):
        forward = mpisjax.SpikeForward(steps)
        spikes = jax.jit(functools.partial(nn.model.spikes, net, neuron=neuron, forward=forward))
        rates = spikes(variables, images).rates
        np.testing.assert_allclose(logits, nn.model.classify(net, variables, rates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"times": (2, 1)}, {"times": (1, 2), "readout": "membrane"}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(UserError, match=r"bptt\.times"):
        BPTT(**settings)


@pytest.mark.slow
def test_second_stage_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = small_run(times=(1, 2))[0]
    config.data.num_validation = 100
    config.train.update({"epochs": 1, "batch_size": 90, "test_at_end": False, "checkpoint_every": 4})
    with config.unlocked():
        first = config.copy_and_resolve_references()
    first.forward.mode, first.train.method, first.bptt.times = "rates", "implicit", ()
    run.run(first, tmp_path / "rates")
    config.train.init_from = str(tmp_path / "rates")
    whole = run.run(config, tmp_path / "whole")

    stopper = Stopper()

    class StopsOnce(data.Feed):
        def batch(self, number):
            if number == 6 and stopper.requested is None:
                stopper.request("SIGTERM")
            return super().batch(number)

    monkeypatch.setattr(run, "Feed", StopsOnce)
    part = run.run(config, tmp_path / "parts", stopper)
    assert part.stopped and part.step == 7
    monkeypatch.undo()
    last = run.run(config, tmp_path / "parts")
    assert not last.stopped and last.step == whole.step
    plain = [s._replace(rng=jax.random.key_data(s.rng)) for s in (last.state, whole.state)]
    jax.tree.map(np.testing.assert_array_equal, *plain)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), part.state.params, whole.state.params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.slow
def test_second_stage_of_the_digits_answers_after_one_step(tmp_path):
    def right_after_one_step(variant, epochs, init_from):
        config = config_files.load_config(variant)
        config.train.update({"epochs": epochs, "init_from": init_from, "test_at_end": False})
        workdir = tmp_path / config.name
        run.run(config, workdir)
        parts, state, _ = run.restore_best(workdir, config)
        found = run.evaluate_at(config, parts, state, parts.dataset.validation, 1)
        return found.accuracy_spikes, str(workdir)

    before, first = right_after_one_step("digits", 6, "")
    after, _ = right_after_one_step("digits:low", 2, first)
    assert after > max(before, 0.8), (before, after)
