"""Gradient accumulation, reduced precision, and layers shared among devices: what they change, and what they do not."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax.configuration import makers
from mpisjax.data import Batch, prepare_images
from mpisjax.nn import model
from mpisjax.simulate import simulate
from mpisjax.solvers import Adjoint, RateForward, solve_adjoint, solve_rates

sys.path.insert(0, str(Path(__file__).parent))
from worker import settings

pytestmark = pytest.mark.unoptimized

ROWS = 24


@pytest.fixture(scope="module")
def dataset():
    return makers.make_dataset(settings())


def state_of(config, net, dataset):
    return makers.init_state(config, makers.initial_variables(config, net, dataset), 10)


def batch_of(dataset, rows):
    images, labels = dataset.train.images[: len(rows)][rows], dataset.train.labels[: len(rows)][rows]
    return Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(len(rows)))


@pytest.mark.slow
def test_accumulation_is_the_mean_over_its_parts(dataset):
    """Against steps on each part alone: their mean gradient, hence (plain SGD) their mean parameters."""
    config = settings()
    config.model.dropout, config.train.momentum, config.train.weight_decay = 0.0, 0.0, 0.0
    config.data.augment.update(rotate=0.0, zoom=0.0, shift=0)
    config.train.accumulate = 3
    net = makers.make_network(config, dataset)
    batch = batch_of(dataset, np.arange(ROWS))
    whole, metrics = makers.make_train_step(config, net, dataset, 10)(state_of(config, net, dataset), batch)
    config.train.accumulate = 1
    single = makers.make_train_step(config, net, dataset, 10)
    # All parts see the same parameters; running statistics take in one part after another.
    parts, stats = [], state_of(config, net, dataset).batch_stats
    for first in range(3):
        part = jax.tree.map(lambda a, first=first: a[first::3], batch)
        start_of_part = state_of(config, net, dataset)._replace(batch_stats=jax.tree.map(jnp.copy, stats))
        parts.append(single(start_of_part, part))
        stats = parts[-1][0].batch_stats
    assert float(metrics.loss) == pytest.approx(np.mean([float(m.loss) for _, m in parts]), rel=1e-5)
    assert float(metrics.accuracy) == pytest.approx(np.mean([float(m.accuracy) for _, m in parts]))
    expected = jax.tree.map(lambda *p: np.mean(p, axis=0), *[s.params for s, _ in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.batch_stats, stats)


def rates_of(dataset, dtype, mode):
    config = settings()
    config.model.dtype, config.model.dropout = dtype, 0.0
    net = makers.make_network(config, dataset)
    variables = jax.jit(lambda: makers.initial_variables(config, net, dataset))()
    x = prepare_images(jnp.asarray(dataset.train.images[:ROWS]), dataset)
    neuron = makers.make_neuron(config)

    @jax.jit
    def run(variables, x):
        if mode == "rates":
            forward = RateForward("anderson", max_steps=40, tol=1e-3)
            return model.apply(net, variables, x, neuron=neuron, forward=forward).equilibrium.rates
        return model.spikes(
            net, variables, x, neuron=neuron, forward=makers.make_spike_forward(config, num_steps=16)
        ).rates

    return jax.tree.map(lambda a: np.asarray(a, np.float32), run(variables, x))


@pytest.mark.parametrize(("mode", "bound"), [("rates", 0.02), ("spikes", 0.1)])
def test_rates_in_bfloat16_stay_close(dataset, mode, bound):
    """The bound is on ||difference|| / ||rates||, by stream; bfloat16 has 8 bits, hence 0.4% by rounding once. A spike
    that comes a step late is 1/16 of a rate.
    """
    exact, coarse = rates_of(dataset, "float32", mode), rates_of(dataset, "bfloat16", mode)
    for stream, rates in exact.items():
        error = np.linalg.norm(coarse[stream] - rates) / np.linalg.norm(rates)
        assert 0 < error < bound


def test_bfloat16_leaves_the_rest_in_float32(dataset):
    config = settings()
    config.model.dtype = "bfloat16"
    net = makers.make_network(config, dataset)
    state, batch = jax.eval_shape(lambda: state_of(config, net, dataset)), batch_of(dataset, np.arange(ROWS))
    new, metrics = jax.eval_shape(makers.make_train_step(config, net, dataset, 10), state, batch)
    for leaf in jax.tree.leaves((new.params, new.batch_stats, new.opt_state, metrics)):
        assert leaf.dtype != jnp.bfloat16
    rates = net.initial_rates(jnp.zeros((1, 8, 8, 1)))
    assert {leaf.dtype for leaf in jax.tree.leaves(rates)} == {jnp.dtype(jnp.bfloat16)}
    text = makers.make_train_step(config, net, dataset, 10).lower(state, batch).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("bf16>" in line.rsplit("->", 1)[-1] for line in convolutions)


def test_membrane_potentials_keep_float32(dataset):
    """A current of 0.003 for 1,000 steps: in 8 bits a potential near its threshold would swallow such addends."""
    config = settings()

    def transition(params, rates, x, fire):
        del params
        return fire("one", x + 0 * rates)

    x = jnp.full((1, 1), 3e-3, jnp.bfloat16)
    neuron = makers.make_neuron(config)
    found = simulate(
        transition,
        (),
        x,
        jnp.zeros_like(x),
        neuron=neuron,
        forward=makers.make_spike_forward(config, num_steps=1000),
    )
    # The current itself is rounded to 8 bits; its thousandfold sum is not rounded any more.
    assert float(found.rates[0, 0]) == pytest.approx(np.floor(1000 * float(x[0, 0])) / 1000, rel=0.01)


@pytest.mark.parametrize("solver", ["neumann", "anderson", "gmres", "bicgstab"])
def test_adjoint_in_bfloat16_is_solved_in_float32(solver):
    """With J exactly representable, a solve that rounded its own sums to 8 bits could not come closer than 0.4%."""
    matrix = np.array([[0.5, 0.25, 0.0], [0.0, 0.25, 0.5], [0.125, 0.0, 0.5]])
    g = np.array([1.0, -0.5, 0.25])
    expected = np.linalg.solve(np.eye(3) - matrix, g)
    narrow = jnp.asarray(matrix, jnp.bfloat16)
    asked = []

    def product(constants, v):
        asked.append(v.dtype)
        return constants[0] @ v

    config = Adjoint(solver, max_steps=60, tol=1e-2)
    v, stats = solve_adjoint(product, [narrow], jnp.asarray(g, jnp.bfloat16), config, batch_axis=None)
    assert set(asked) == {jnp.dtype(jnp.bfloat16)} and v.dtype == jnp.bfloat16
    assert float(stats.residual) <= 1e-2
    np.testing.assert_allclose(np.asarray(v, np.float32), expected, rtol=0.03, atol=0.01)


def test_rates_in_bfloat16_reach_their_rounding():
    matrix = jnp.asarray([[0.5, 0.25], [0.25, 0.25]], jnp.bfloat16)
    offset = jnp.asarray([[0.25, 0.125]], jnp.bfloat16)
    found = solve_rates(
        lambda c, r: r @ c[0] + c[1],
        [matrix, offset],
        jnp.zeros((1, 2), jnp.bfloat16),
        RateForward("anderson", 40, 2e-3),
    )
    assert found.value.dtype == jnp.bfloat16 and found.residual.dtype == jnp.float32
    expected = np.linalg.solve(np.eye(2) - np.asarray(matrix, float).T, np.asarray(offset, float)[0])
    np.testing.assert_allclose(np.asarray(found.value, float)[0], expected, rtol=0.02)
