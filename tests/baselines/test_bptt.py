"""Backpropagation through time: values, gradients, memory."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import mpisjax
from mpisjax import configuration, data, nn
from mpisjax.baselines import bptt
from mpisjax.baselines.bptt import BPTT
from mpisjax.baselines.surrogates import SURROGATES, spike
from mpisjax.cli import tables
from mpisjax.configuration import makers, rules
from mpisjax.training import evaluation

pytestmark = pytest.mark.unoptimized

# The functions whose derivatives the surrogates should be.
ANTIDERIVATIVES = {
    "rectangular": lambda v: jnp.clip(v, -0.5, 0.5),
    "triangular": lambda v: jnp.where(v < 0, (1 + jnp.maximum(v, -1)) ** 2, 2 - (1 - jnp.minimum(v, 1)) ** 2) / 2,
    "arctan": lambda v: jnp.arctan(jnp.pi * v) / jnp.pi,
    "sigmoid": lambda v: jax.nn.sigmoid(4 * v),
}


def transition(p, z, x, fire):
    return fire("out", fire("hidden", x @ p["in"] + z @ p["back"]) @ p["out"])


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {
        "in": rng.normal(size=(5, 8)) * 0.6,
        "back": rng.normal(size=(6, 8)) * 0.3,
        "out": rng.normal(size=(8, 6)) * 0.6,
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return params, jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jnp.zeros((4, 6))


@pytest.mark.parametrize(
    "surrogate, readout, temporal",
    [
        ("rectangular", "rate", False),
        ("triangular", "membrane", True),
        ("arctan", "rate", True),
        ("sigmoid", "membrane", False),
    ],
)
def test_gradient_is_that_of_a_loop_written_by_hand(problem, surrogate, readout, temporal):
    params, x, init = problem
    threshold, leak, steps = 0.8, 0.9, 7
    neuron = mpisjax.LIF(threshold, leak, initial_potential=0.0)
    if temporal:
        x = jnp.stack([x * (1 + 0.1 * t) for t in range(steps)])
    target = jnp.asarray(np.random.default_rng(1).normal(size=init.shape), jnp.float32)

    def by_hand(p, x):
        soft = ANTIDERIVATIVES[surrogate]
        u1, u2, z = jnp.zeros((4, 8)), jnp.zeros((4, 6)), jnp.zeros((4, 6))
        rate, membrane, weight = 0.0, 0.0, 0.0

        def fires(u):
            smooth = soft(u / threshold - 1)
            return smooth + jax.lax.stop_gradient((u >= threshold) - smooth)

        for t in range(steps):
            u1 = u1 + (x[t] if temporal else x) @ p["in"] + z @ p["back"]
            s1 = fires(u1)
            u1 = leak * (u1 - threshold * s1)
            u2 = u2 + s1 @ p["out"]
            z = fires(u2)
            rate, membrane = leak * rate + z, leak * membrane + u2 / threshold
            weight = leak * weight + 1
            u2 = leak * (u2 - threshold * z)
        return jnp.sum(target * (rate if readout == "rate" else membrane) / weight)

    def ours(p, x, remat):
        out = bptt.unroll(
            transition,
            p,
            x,
            init,
            neuron=neuron,
            num_steps=steps,
            bptt=BPTT(surrogate, readout, remat),
            time_axis=0 if temporal else None,
        )
        return jnp.sum(target * out.readout)

    value, expected = jax.value_and_grad(by_hand, argnums=(0, 1))(params, x)
    for remat in (False, True):
        found, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)), static_argnums=2)(params, x, remat)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), grads, expected)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(expected))


def test_rates_are_the_simulation_s(problem):
    params, x, init = problem
    neuron = mpisjax.LIF(0.7, 0.95, initial_potential=0.5)
    expected = mpisjax.simulate(transition, params, x, init, neuron=neuron, forward=mpisjax.SpikeForward(13)).rates
    found = bptt.unroll(transition, params, x, init, neuron=neuron, num_steps=13, bptt=BPTT())
    np.testing.assert_allclose(found.rates, expected, atol=1e-6)
    assert 0.01 < float(expected.mean()) < 0.99


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_has_area_and_peak_1(surrogate):
    v = jnp.linspace(-400, 400, 800_001)
    slope = jax.vmap(jax.grad(lambda u: spike(u, 2.0, surrogate)))(2 * (v + 1))
    np.testing.assert_allclose(jnp.sum(slope) * 2 * 1e-3, 1, atol=2e-3)
    np.testing.assert_allclose(slope.max(), 1 / 2, rtol=1e-3)


@pytest.mark.parametrize(
    "settings, word", [({"surrogate": "step"}, "bptt.surrogate"), ({"readout": "spikes"}, "bptt.readout")]
)
def test_unknown_settings_are_named(settings, word):
    with pytest.raises(mpisjax.UserError, match=word):
        BPTT(**settings)


def tiny_net(temporal=False, num_streams=2):
    net = nn.MPIS(3, stem=(4,), layers=(6, 8), fusion_layer=1, num_streams=num_streams, dropout=0.2, temporal=temporal)
    images = jax.random.uniform(jax.random.key(1), (5, 4, 8, 8, 1) if temporal else (4, 8, 8, 1))
    return net, images, nn.init_variables(net, jax.random.key(0), images, mpisjax.IF())


@pytest.mark.slow
def test_network_gets_finite_gradients_everywhere_and_new_statistics():
    net, images, variables = tiny_net(temporal=True)
    num_steps = 5

    def loss(params):
        out = bptt.apply(
            net,
            {**variables, "params": params},
            images,
            neuron=mpisjax.IF(),
            num_steps=num_steps,
            bptt=BPTT("arctan", "membrane"),
            train=True,
            rng=jax.random.key(2),
        )
        return jnp.sum(jnp.square(out.logits - 1)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert out.logits.shape == (4, 3) and int(out.equilibrium.num_steps) == num_steps
    norms = {jax.tree_util.keystr(k): float(jnp.abs(g).max()) for k, g in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(n) for n in norms.values())
    silent = {k for k, n in norms.items() if n == 0}
    assert not silent, silent
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), out.batch_stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def temporary_bytes(method, steps):
    net, images, variables = tiny_net(num_streams=1)
    images = jnp.tile(images, (8, 1, 1, 1))

    def loss(params):
        out_of = {**variables, "params": params}
        if method == "implicit":
            out = nn.apply(net, out_of, images, neuron=mpisjax.IF(), forward=mpisjax.SpikeForward(steps))
        else:
            settings = BPTT(remat=method == "remat")
            out = bptt.apply(net, out_of, images, neuron=mpisjax.IF(), num_steps=steps, bptt=settings)
        return jnp.sum(out.logits**2)

    compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
    usage = compiled.memory_analysis()
    assert usage is not None
    return usage.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.optimized
def test_memory_grows_linearly_with_time_and_the_implicit_method_s_does_not():
    steps = np.array([4, 16, 64])
    through_time = np.array([temporary_bytes("bptt", t) for t in steps])
    implicit = np.array([temporary_bytes("implicit", t) for t in steps])
    slope, offset = np.polyfit(steps, through_time, 1)
    residual = through_time - (slope * steps + offset)
    r_squared = 1 - np.sum(residual**2) / np.sum((through_time - through_time.mean()) ** 2)
    assert r_squared > 0.99
    assert slope * 60 > 5 * implicit[0]
    assert abs(implicit[-1] - implicit[0]) <= 0.02 * implicit[0]
    assert temporary_bytes("remat", 64) < 0.7 * through_time[-1]


def test_training_step_takes_the_switch():
    config = configuration.base()
    config.model.update({"stem": (4,), "layers": (6, 8), "num_streams": 1, "fusion_layer": 1})
    config.train.update({"method": "bptt", "batch_size": 30, "warmup_epochs": 0.0})
    config.forward.num_steps = 6
    rules.check(config)
    dataset = makers.make_dataset(config)
    net = makers.make_network(config, dataset)
    batch = data.Feed(dataset.train, 30, seed=0).batch(0)
    images = data.prepare_images(batch.images, dataset)
    variables = nn.init_variables(net, jax.random.key(0), images, makers.make_neuron(config))
    train = makers.make_train_step(config, net, dataset, steps_per_epoch=20)
    trained = makers.init_state(config, variables, 20)
    losses = []
    for _ in range(12):
        trained, metrics = train(trained, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0], losses
    assert int(metrics.forward_steps) == 6 and int(metrics.finite) == 1


def test_rates_cannot_be_trained_through_time():
    config = configuration.base()
    config.train.method = "bptt"
    config.forward.mode = "rates"
    with pytest.raises(mpisjax.UserError, match=r"forward\.mode"):
        rules.check(config)


@pytest.mark.parametrize(
    "method, readout, said",
    [
        ("implicit", "rate", "equivalent path"),
        ("bptt", "rate", "readout it was trained with, firing rates"),
        ("bptt", "membrane", "readout it was trained with, mean membrane potentials"),
    ],
)
def test_accuracy_is_named_by_the_readout_it_is_of(method, readout, said):
    config = configuration.base()
    config.train.method, config.bptt.readout = method, readout
    assert evaluation.readout_name(makers.make_bptt(config)) == said
    result = {"accuracy": 0.5, "accuracy_spikes": 0.25, "loss": 1.0, "synops": None, "num_steps": 4}
    result |= {"residual": {}, "firing_rates": {}}
    console = Console(record=True, width=140, file=io.StringIO())
    tables.show(console, "a run", result, evaluation.readout_name(makers.make_bptt(config)))
    tables.show_steps(console, [result], evaluation.readout_name(makers.make_bptt(config)))
    shown = console.export_text()
    assert shown.count(said) >= 2 and (method == "implicit") == ("equivalent path" in shown)
