"""Operations, energy, measurements and the gradient audit, each against another way to the same number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpisjax
from mpisjax import configuration, nn
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
    {"num_streams": 2, "feedback_norm": "none", "fusion_layer": 1},
]


def products_of(eqn):
    """Multiplications of a convolution without those with padding or inserted zeros, or of a matrix product."""
    a, kernel = (v.aval.shape for v in eqn.invars)
    if eqn.primitive.name == "dot_general":
        return int(np.prod(eqn.outvars[0].aval.shape)) * a[-1]
    p, total = eqn.params, kernel[2] * kernel[3]
    for axis in (0, 1):
        size, taps, out = a[1 + axis], kernel[axis], eqn.outvars[0].aval.shape[1 + axis]
        stride, dilation, before = p["window_strides"][axis], p["lhs_dilation"][axis], p["padding"][axis][0]
        places = [o * stride + tap - before for o in range(out) for tap in range(taps)]
        total *= sum(0 <= i <= dilation * (size - 1) and i % dilation == 0 for i in places)
    return total


@pytest.mark.parametrize("settings", NETS)
def test_every_product_of_the_network_is_counted(settings):
    """Against a count of the taps that meet no padding, in the program of one evaluation of everything."""
    net, images, variables = net_and_variables(**settings)
    images = images[..., :1, :, :, :]  # one sample

    def everything(variables):
        x = net.apply(variables, images, False, method="encode")
        x = x[0] if net.temporal else x
        reading = mpisjax.firing.RateReading(mpisjax.IF())
        rates = net.apply(variables, net.initial_rates(images), x, reading, False, method="transition")
        return net.apply(variables, rates, False, method="classify")

    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
                found.append(products_of(eqn))
            params = {"plain": eqn.params["plain"]} if "on_cpu" in eqn.params else eqn.params
            for inner in jax.tree.leaves(params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(everything)(variables).jaxpr)
    dense = operations.dense_cost(net, variables, images, mpisjax.IF(), 1)
    assert sum(dense.macs.values()) == sum(found)
    counted = operations.count_operations(net, variables, images, mpisjax.IF())
    assert counted.once + counted.every_step + sum(f.sum() for f in counted.fan_out.values()) == sum(found)
    assert (counted.every_step > 0) == (net.temporal or (net.num_streams > 1 and net.feedback_norm != "none"))


@pytest.mark.parametrize("settings", [NETS[1], NETS[3]])
def test_synops_are_the_events_that_arrive(settings):
    net, images, variables = net_and_variables(**settings)
    forward = mpisjax.SpikeForward(None if net.temporal else 6)
    simulation = nn.spikes(net, variables, images, neuron=mpisjax.IF(), forward=forward)
    counts = simulation.spike_counts
    found = operations.count_operations(net, variables, images, mpisjax.IF()).synops(counts)
    assert any(float(v.sum()) > 0 for v in found.values())
    for name, number in found.items():
        stream, layer = name.split("/")
        last = layer == f"layer{len(net.layers)}"
        if stream != "stem" and last:
            channels, size = net.layers[0], counts[f"{stream}/layer1"].shape[1:3]
            kernel = jnp.ones((3, 3, channels, counts[name].shape[-1]))
            arrived = nn.convolution.conv_transpose2d(counts[name], kernel, 2 if net.stride_layer else 1, size)
        else:
            target = "stream1/layer1" if stream == "stem" else f"{stream}/layer{int(layer[-1]) + 1}"
            shape = counts[target].shape
            kernel = jnp.ones((3, 3, counts[name].shape[-1], shape[-1]))
            arrived = nn.convolution.conv2d(counts[name], kernel, 2 if shape[1] < counts[name].shape[1] else 1)
        np.testing.assert_allclose(number, arrived.sum((1, 2, 3)), rtol=1e-5)


class Own:
    """A network of one's own: two populations that are fed back together, a pooled one, and a product of currents."""

    def __init__(self, looped=False):
        self.looped = looped

    def init(self, key, images):
        shapes = {"a": (4, 6), "b": (12, 5), "c": (3, 5), "d": (5, 4), "out": (5, 2)}
        keys = jax.random.split(key, len(shapes))
        return {"params": {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}}

    def initial_rates(self, images):
        return {"a": jnp.zeros((len(images), 6)), "b": jnp.zeros((len(images), 5))}

    def encode(self, variables, images, train):
        return images.reshape(len(images), -1), {}

    def currents(self, params, rates, x, fire):
        a = fire("a", x @ params["a"] + 0.1)
        both = jnp.concatenate([a, jnp.pad(rates["b"], ((0, 0), (0, 1)))], 1)
        current = jnp.tanh(both @ params["b"]) @ params["d"] @ params["d"].T
        pooled = rates["a"].reshape(-1, 3, 2).sum(-1)
        if self.looped:
            return jax.lax.fori_loop(0, 2, lambda i, c: c @ params["d"] @ params["d"].T, current), pooled, a
        return current + rates["a"][:, :5] @ params["d"] @ params["d"].T, pooled, a

    def transition(self, variables, rates, x, fire, train):
        current, pooled, a = self.currents(variables["params"], rates, x, fire)
        return {"a": a, "b": fire("b", current + pooled @ variables["params"]["c"])}, {}

    def classify(self, variables, rates, train):
        return rates["b"] @ variables["params"]["out"], {}


def test_a_network_of_ones_own_is_counted():
    net, images = nn.network.as_module(Own()), jnp.ones((3, 2, 2, 1))
    variables = net.init(jax.random.key(0), images, None)
    found = operations.count_operations(net, variables, images, mpisjax.IF())
    # a reaches b (5), through pools of two c (5), and five of its six neurons d (4); b reaches itself.
    np.testing.assert_array_equal(found.fan_out["a"], 5 + 5 + 4 * (np.arange(6) < 5))
    np.testing.assert_array_equal(found.fan_out["b"], [5] * 5)
    # Once: into a, and out. In every step: d and its transpose on a current, and once more its transpose.
    assert (found.once, found.every_step) == (4 * 6 + 5 * 2, 3 * 5 * 4)
    assert (found.additions, found.neurons) == (2 * 5, 11)
    counted = found.synops({"a": 2 * jnp.ones((3, 6)), "b": jnp.ones((3, 5))})
    np.testing.assert_array_equal(counted["a"], [2 * (6 * 10 + 5 * 4)] * 3)
    np.testing.assert_array_equal(counted["b"], [25] * 3)
    looped = nn.network.as_module(Own(looped=True))
    assert operations.count_operations(looped, variables, images, mpisjax.IF()) is None


def test_energy_is_the_constants_times_the_counts():
    counted = operations.Operations({}, once=108, every_step=40.0, additions=3.0, neurons=7)
    found = counted.cost({"conv": 1000.0}, num_steps=10, leak=1.0)
    macs = 108 + 400
    assert sum(found.macs.values()) == macs
    assert found.compute_uj == pytest.approx((0.9 * (1000 + 30 + 70) + 4.6 * macs) * 1e-6)
    assert found.memory_uj == pytest.approx(50 * (3000 + 2 * macs + 140) * 1e-6)
    leaky = counted.cost({"conv": 1000.0}, num_steps=10, leak=0.9)
    assert leaky.compute_uj - found.compute_uj == pytest.approx(3.7 * 70 * 1e-6)


@pytest.fixture(scope="module")
def digits():
    config = configuration.base()
    config.model.update({"stem": (4,), "layers": (5, 6)})
    config.forward.num_steps = 5
    config.eval.batch_size = 32
    config.devices.all_cores = False
    dataset = makers.make_dataset(config)
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
