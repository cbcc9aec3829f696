"""Operations, energy, measurements and the gradient audit, each against another way to the same number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import configuration, data, nn
from mpisjax.analysis.audit import audit_solves, gradient_audit
from mpisjax.analysis.measure import first_examples, measure
from mpisjax.configuration import makers
from mpisjax.nn import operations

pytestmark = pytest.mark.unoptimized


def net_and_variables(temporal=False, **settings):
    settings = {"stem": (4,), "stem_strides": (1,), "layers": (5, 6), "temporal": temporal, **settings}
    net = nn.MPIS(3, **settings)
    images = jax.random.uniform(jax.random.key(1), (5, 2, 9, 7, 2) if temporal else (2, 9, 7, 2))
    shapes = jax.eval_shape(lambda key: nn.init_variables(net, key, images, mpisjax.IF()), jax.random.key(0))
    rng = np.random.default_rng(0)  # positive like a variance; cheaper than compiling the initialisers
    return net, images, jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1, s.shape), s.dtype), shapes)


NETS = [
    {},
    {"temporal": True},
    {
        "num_streams": 3,
        "layers": (5, 6, 7),
        "fusion_layer": 1,
        "stride_layer": 3,
        "stem": (4, 4),
        "stem_strides": (1, 2),
    },
    {"num_streams": 1, "head": "smallest", "stride_layer": 0},
    {"num_streams": 2, "feedback_norm": "none"},
]


@pytest.mark.parametrize("settings", NETS)
def test_every_convolution_of_the_network_is_counted(settings):
    net, images, variables = net_and_variables(**settings)
    links = operations.synapses(net, images.shape[-3:])

    def everything(variables):
        x = net.apply(variables, images, False, method="encode")
        x = x[0] if net.temporal else x
        reading = mpisjax.firing.RateReading(mpisjax.IF())
        rates = net.apply(variables, net.initial_rates(images), x, reading, False, method="transition")
        return net.apply(variables, rates, False, method="classify")

    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                kernel, dilated = eqn.invars[1].aval.shape, eqn.params["lhs_dilation"] != (1, 1)
                pixels = eqn.invars[0].aval.shape[1:3] if dilated else eqn.outvars[0].aval.shape[1:3]
                found.append(int(np.prod(kernel) * np.prod(pixels)))
            elif eqn.primitive.name == "dot_general":
                found.append(int(np.prod(eqn.invars[1].aval.shape)))
            params = eqn.params
            if eqn.primitive.name == "cond":  # one form a platform: the last is the plain one
                params = {"plain": params["branches"][-1]}
            for inner in jax.tree.leaves(params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(everything)(variables).jaxpr)
    # XLA's count includes the products with padding, ours does not: at most so much less.
    assert len(found) == len(links)
    for ours, theirs in zip(sorted(s.macs for s in links), sorted(found), strict=True):
        assert 0.1 * theirs < ours <= theirs
    assert [s for s in links if s.source is None and s.every_step] or net.num_streams == 1


@pytest.mark.parametrize("settings", [NETS[1], NETS[3]])
def test_synops_are_the_events_that_arrive(settings):
    net, images, variables = net_and_variables(**settings)
    forward = mpisjax.SpikeForward(None if net.temporal else 6)
    simulation = nn.spikes(net, variables, images, neuron=mpisjax.IF(), forward=forward)
    links = operations.synapses(net, images.shape[-3:])
    found = operations.synops(links, simulation.spike_counts)
    assert any(float(v.sum()) > 0 for v in found.values())
    for link in links:
        if link.source is None:
            continue
        counts, kernel = simulation.spike_counts[link.source], jnp.ones((3, 3))
        if link.name.endswith("trans"):
            stream = link.name.split("/")[0]
            size, channels = simulation.spike_counts[f"{stream}/layer1"].shape[1:3], net.layers[0]
            kernel = jnp.ones((3, 3, channels, counts.shape[-1]))
            arrived = nn.convolution.conv_transpose2d(counts, kernel, 2 if net.stride_layer else 1, size)
        else:
            target = {"inject": "stream1/layer1"}.get(link.name, link.name.replace("conv", "layer"))
            shape = simulation.spike_counts[target].shape
            kernel = jnp.ones((3, 3, counts.shape[-1], shape[-1]))
            arrived = nn.convolution.conv2d(counts, kernel, 2 if shape[1] < counts.shape[1] else 1)
        np.testing.assert_allclose(found[link.name], arrived.sum((1, 2, 3)), rtol=1e-5)


def test_energy_is_the_constants_times_the_counts():
    links = [
        operations.Synapses("stem", None, np.full((2, 2), 9.0), 3, False),
        operations.Synapses("conv", "a", np.full((2, 2), 4.0), 5, True),
        operations.Synapses("fusion", None, np.full((2, 2), 2.0), 5, True),
    ]
    counted: Any = {"num_steps": 10, "neurons": 7, "additions": 3.0}
    found = operations.cost(links, {"conv": 1000.0}, **counted, leak=1.0)
    macs = 108 + 400
    assert sum(found.macs.values()) == macs
    assert found.compute_uj == pytest.approx((0.9 * (1000 + 30 + 70) + 4.6 * macs) * 1e-6)
    assert found.memory_uj == pytest.approx(50 * (3000 + 2 * macs + 140) * 1e-6)
    leaky = operations.cost(links, {"conv": 1000.0}, **counted, leak=0.9)
    assert leaky.compute_uj - found.compute_uj == pytest.approx(3.7 * 70 * 1e-6)
    dense = operations.dense_cost([*links, links[1]._replace(name="head/x")], 6)
    assert sum(dense.macs.values()) == 6 * (108 + 80 + 40) + 80


@pytest.fixture(scope="module")
def digits():
    config = configuration.base()
    config.model.update({"stem": (4,), "layers": (5, 6)})
    config.forward.num_steps = 5
    config.eval.batch_size = 32
    config.devices.all_cores = False
    dataset = data.load(config.data)
    net = makers.make_network(config, dataset)
    images = jnp.zeros((2, 8, 8, 1))
    init = jax.jit(lambda key: nn.init_variables(net, key, images, mpisjax.IF()))
    return config, net, init(jax.random.key(0)), dataset


def test_measurements_agree_with_the_evaluation(digits):
    config, net, variables, dataset = digits
    split = first_examples(dataset.test, 50)
    asked = {"neuron": makers.make_neuron(config), "batch_size": 32}
    measured, cost = measure(net, variables, dataset, split, num_steps=5, **asked)
    found = measured.evaluation
    expected = makers.make_evaluator(config, net, dataset)(variables, split)
    assert found.num_examples == 50 == len(measured.answers)
    assert found.accuracy == pytest.approx(expected.accuracy)
    assert found.accuracy_spikes == pytest.approx(expected.accuracy_spikes)
    assert found.firing_rates == pytest.approx(expected.firing_rates, rel=1e-4)  # unweighted is weighted for IF
    assert found.residual == pytest.approx(expected.residual, rel=1e-4)
    (shorter, less), (longer, more) = (measure(net, variables, dataset, split, num_steps=t, **asked) for t in (2, 8))
    assert [shorter.evaluation.num_steps, longer.evaluation.num_steps] == [2, 8]
    assert sum(less.synops.values()) < sum(cost.synops.values()) < sum(more.synops.values())


def test_the_evaluation_counts_spikes_where_neurons_leak(digits):
    """At leak 0.7, against a loop over time that counts: leak-weighted rates are other numbers."""
    config, net, variables, dataset = digits
    config = config.copy_and_resolve_references()
    config.neuron.update(leak=0.7)
    neuron = makers.make_neuron(config)
    split = first_examples(dataset.test, 20)
    images = (jnp.asarray(np.asarray(split.images), jnp.float32) / 255 - jnp.asarray(dataset.mean)) / jnp.asarray(
        dataset.std
    )
    x = net.apply(variables, images, False, method="encode")
    potentials, counts, rates = {}, {}, net.initial_rates(images)

    def fire(name, current):
        u = potentials.get(name, neuron.initial_potential) + current
        spikes = (u >= 1).astype(current.dtype)
        potentials[name] = neuron.leak * (u - spikes)
        counts[name] = counts.get(name, 0.0) + spikes
        return spikes

    for _ in range(5):
        rates = net.apply(variables, rates, x, fire, False, method="transition")
    counted = {name: float(jnp.mean(count)) / 5 for name, count in counts.items()}
    found = makers.make_evaluator(config, net, dataset)(variables, split)
    assert found.firing_rates == pytest.approx(counted, rel=1e-3)
    assert max(counted.values()) > 0.05


@pytest.mark.parametrize("readout", ["rate", "membrane"])
def test_nets_trained_through_time_answer_by_their_own_readout(digits, readout):
    from mpisjax.baselines import bptt

    config, net, variables, dataset = digits
    config = config.copy_and_resolve_references()
    config.train.method, config.bptt.readout = "bptt", readout
    split = first_examples(dataset.test, 32)
    images = jnp.asarray(np.asarray(split.images), jnp.float32) / 255
    images = (images - jnp.asarray(dataset.mean)) / jnp.asarray(dataset.std)
    settings = bptt.BPTT(readout=readout)
    answer = jax.jit(lambda v: bptt.apply(net, v, images, neuron=mpisjax.IF(), num_steps=5, bptt=settings))
    logits = answer(variables).logits
    expected = np.mean(np.argmax(logits, -1) == split.labels)
    found, _ = measure(
        net,
        variables,
        dataset,
        split,
        neuron=mpisjax.IF(),
        num_steps=5,
        through_time=makers.make_bptt(config),
    )
    assert found.evaluation.accuracy == pytest.approx(expected)


@pytest.mark.slow
def test_audit_ranks_the_gradients(digits):
    dataset = digits[-1]
    net = nn.MPIS(10, stem=(), stem_strides=(), layers=(5, 6), num_streams=1, fusion_layer=1)
    init = jax.jit(lambda key: nn.init_variables(net, key, jnp.zeros((2, 8, 8, 1)), mpisjax.IF()))
    variables = init(jax.random.key(0))
    images = jnp.asarray(np.asarray(dataset.test.images[:4]), jnp.float32) / 255
    labels = jnp.asarray(dataset.test.labels[:4])
    audit = gradient_audit(
        net,
        variables,
        images,
        labels,
        neuron=mpisjax.IF(),
        num_steps=40,
        adjoint=mpisjax.Adjoint(max_steps=60, tol=1e-6),
        surrogates=("triangular",),
        unrolled_steps=60,
        phantom_steps=0,
    )
    assert audit.reference == "dense exact"
    exact, spikes, phantom, unrolled, through_time = (a["all"] for a in audit.agreements.values())
    for same in (exact, unrolled):
        assert same.cosine > 0.99999 and abs(same.norm_ratio - 1) < 1e-3
    assert phantom.cosine < exact.cosine - 1e-6
    assert 0.8 < spikes.cosine < 1
    assert through_time.cosine < spikes.cosine
    layers = next(iter(audit.agreements.values()))
    assert {"inject", "classifier", "trans_0"} <= set(layers)
    solves = {
        "loose": (mpisjax.RateForward(max_steps=1, tol=0.0), mpisjax.Adjoint("phantom", 0)),
        "tight": (mpisjax.RateForward(max_steps=200, tol=1e-6), mpisjax.Adjoint(max_steps=60, tol=1e-6)),
    }
    found = audit_solves(net, variables, images, labels, neuron=mpisjax.IF(), solves=solves)
    assert found["loose"].evaluations == 1 and found["loose"].residual > 10 * found["tight"].residual
    assert found["loose"].agreement.cosine < 0.9999 and found["tight"].agreement.cosine > 0.99999
