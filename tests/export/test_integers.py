"""Integer weights: one arithmetic in mpisjax and in NumPy, calibration, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import random_variables

import mpisjax
from mpisjax import nn
from mpisjax.errors import UserError
from mpisjax.export import check, cost, finetune, folded, nir_graph, nir_host, quantise
from mpisjax.export.__main__ import main
from mpisjax.firing import RateReading

pytestmark = pytest.mark.unoptimized
nir = pytest.importorskip("nir", reason="the nir package is not installed: pip install nir")

MEAN, STD, STEPS = np.array([0.4, 0.5]), np.array([0.2, 0.3]), 8


def small(stem_part="spikes", head_part="spikes", neuron=None, side=8, **settings):
    """A random network, its pixels and what it reads of them in integers."""
    net = nn.MPIS(3, **{"stem": (3,), "layers": (4, 5), **settings})
    form = folded.Form(net, neuron or mpisjax.IF(0.8), (side, side), stem_part, head_part)
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side, 2), np.uint8)
    images = (pixels / 255 - MEAN) / STD
    network = folded.fold_network(form, random_variables(net, jnp.asarray(images), 0))
    network, offset = quantise.pixel_network(form, network, MEAN, STD)
    x = pixels - offset.astype(float) if form.stem_spikes else images
    return form, network, pixels, x, offset


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("stem", "head", "settings"),
    [
        ("spikes", "spikes", {}),
        ("host", "host", {"learn_threshold": True}),
        pytest.param("spikes", "spikes", {"num_streams": 1}, marks=pytest.mark.slow),
        pytest.param("host", "spikes", {"fusion_layer": 1}, marks=pytest.mark.slow),
        pytest.param("spikes", "host", {"head": "smallest", "side": 7}, marks=pytest.mark.slow),
    ],
)
def test_integers_are_the_same_in_numpy(x64, tmp_path, bits, stem, head, settings):
    form, network, pixels, x, offset = small(stem, head, **settings)
    given = folded.encode(form, network, jnp.asarray(x))
    whole = quantise.quantise(form, network, given, bits, STEPS)
    in_graph = [whole.layers.trans, whole.layers.feb, whole.layers.down]
    in_graph += [whole.layers.stem, whole.layers.inject] if form.stem_spikes else []
    assert {leaf.dtype for leaf in jax.tree.leaves(in_graph)} == {np.dtype(np.int32)}
    about = {"offset": offset}
    if not form.stem_spikes:
        about = {"mean": MEAN, "std": STD, "scale": np.array([form.neuron.threshold / quantise.UNITS])}
    graph = nir_graph.to_nir(form, whole, pixels=about)
    nir.write(tmp_path / "net.nir", graph)
    read = nir.read(tmp_path / "net.nir")
    assert all(n.weight.dtype.kind == "i" for n in read.nodes.values() if hasattr(n, "weight"))
    assert nir_host.Simulator(read, 1, np.int64).step(nir_host.encode(read, pixels[:1]))[
        "stream1_layer1_potential"
    ].dtype == np.dtype(np.int64)
    exported = check.Exported(form, whole, about)
    found = check.spike_for_spike(exported, read, pixels, STEPS)
    assert len(found.classes) == len(pixels) and sum(found.spikes.values()) > 500
    assert check.by_steps(exported, pixels, found.classes, STEPS)[-1] == 1


def test_a_changed_spike_is_found(x64):
    form, network, pixels, x, offset = small()
    whole = quantise.quantise(form, network, folded.encode(form, network, jnp.asarray(x)), 8, STEPS)
    graph = nir_graph.to_nir(form, whole, pixels={"offset": offset})
    graph.nodes["stream2_layer1_spikes"].threshold[0, 0, 0] -= 700
    with pytest.raises(UserError, match=r"spikes of stream\d/layer\d differ at step"):
        check.spike_for_spike(check.Exported(form, whole, {"offset": offset}), graph, pixels, STEPS)


def test_weights_are_few_bits_times_a_gain(x64):
    form, network, _, x, _ = small()
    seen = quantise.moments(form, network, jnp.asarray(x), STEPS)
    for bits in (8, 4):
        gain = quantise.gains(form, network.layers, seen, bits)
        whole = quantise.integers(form, network, gain, bits)
        kernel, gains = whole.layers.trans[0].kernel, gain.trans[0]
        q = kernel / gains[:, None]
        np.testing.assert_array_equal(q, np.rint(q))
        assert np.abs(q).max() == 2 ** (bits - 1) - 1


def test_more_bits_come_closer_and_calibration_helps(x64):
    form, network, _, x, _ = small()
    seen = quantise.moments(form, network, jnp.asarray(x), STEPS)
    layer, moments = network.layers.feb[0][0], seen.feb[0][0]

    def errors(bits, correct):
        gain = quantise.gains(form, network.layers, seen, bits)
        grid = quantise.rounded(form, network.layers, gain, bits)
        new = (quantise.corrected(form, network.layers, grid, seen) if correct else grid).feb[0][0]
        moved = np.asarray(new.kernel) - layer.kernel
        mean = moments.mean @ moved.sum((0, 1)) + new.bias - layer.bias
        return np.square(moved).mean() ** 0.5, np.abs(mean).max()

    assert errors(8, False)[0] < 0.2 * errors(4, False)[0]
    assert errors(4, True)[1] < 1e-9 < errors(4, False)[1]


def test_rounding_lets_gradients_through(x64):
    form, network, _, x, _ = small()
    seen = quantise.moments(form, network, jnp.asarray(x), STEPS)
    gain = quantise.gains(form, network.layers, seen, 4)

    def loss(layers, straight):
        layers = quantise.rounded(form, layers, gain, 4, straight)
        return jnp.sum(jnp.square(layers.inject.kernel))

    layers = jax.tree.map(jnp.asarray, network.layers)
    new = quantise.rounded(form, layers, gain, 4).inject.kernel
    np.testing.assert_allclose(jax.grad(loss)(layers, True).inject.kernel, 2 * new)
    assert not np.any(jax.grad(loss)(layers, False).inject.kernel)


@pytest.mark.parametrize("stem", ["spikes", "host"])
def test_what_is_fine_tuned_is_what_is_exported(x64, stem):
    """One pass of rates gives the logits of the integers, and each weight has a gradient."""
    form, network, pixels, x, _ = small(stem, stem, learn_threshold=True)
    seen = quantise.moments(form, network, folded.encode(form, network, jnp.asarray(x)), STEPS)
    gain = quantise.gains(form, network.layers, seen, 4)
    tuned = finetune.Rounded(form, network, gain, 4, MEAN, STD)
    variables = jax.tree.map(lambda a: a.astype(float), tuned.init(jax.random.key(0), jnp.zeros(())))
    images = jnp.asarray((pixels / 255 - MEAN) / STD)
    back = tuned.trained(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, network.layers)

    def logits(variables):
        given, rates = tuned.encode(variables, images, False)[0], tuned.initial_rates(images)
        for _ in range(3):
            rates, _ = tuned.transition(variables, rates, given, RateReading(form.neuron), True)
        return tuned.classify(variables, rates, True)[0]

    whole = quantise.integers(form, network, gain, 4)
    whole = jax.tree.map(lambda a: jnp.asarray(a, float), whole)
    given, rates = folded.encode(form, whole, jnp.asarray(x)), form.initial_rates(len(x))
    given = given if stem == "spikes" else jnp.rint(given / form.threshold * quantise.UNITS)
    for _ in range(3):
        rates = folded.transition(form)(whole, rates, given, RateReading(form.neuron))
    wanted = folded.classify(form, whole, rates)
    if stem == "spikes":  # the classifier's integers have one gain for all
        wanted = wanted * gain.classifier / quantise.RELAY
    np.testing.assert_allclose(logits(variables), wanted, atol=2e-3)
    grads = jax.grad(lambda v: jnp.sum(jnp.sin(logits(v))))(variables)["params"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_command_fine_tunes(tmp_path, capsys):
    out = tmp_path / "digits4.nir"
    arguments = ["--pretrained", "digits", "--format", "nir", "--weights", "int4", "--finetune", "1", "--check", "60"]
    main([*arguments, "--out", str(out)])
    assert "all classes are the same" in capsys.readouterr().out
    assert (tmp_path / "digits4.nir.finetune" / "metrics.jsonl").exists()
    main([*arguments, "--out", str(out)])  # goes on with the run that is complete
    assert "all classes are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"num_streams": 3}, "num_streams"), ({"neuron": mpisjax.LIF(1.0, 0.9)}, "neuron.leak")],
)
def test_what_integers_cannot_hold_is_refused(x64, settings, words):
    form, *_ = small(**settings)
    with pytest.raises(UserError, match=words):
        quantise.check(form)


def test_the_cost_of_a_network_counted_by_hand(x64):
    form, network, *_ = small(num_streams=1, layers=(3,), fusion_layer=1, stride_layer=0, side=2)
    spikes = {"stem_layer1": 10.0, "stream1_layer1": 5.0, "head": 2.0}
    found = cost.estimate(form, network, "int8", spikes, STEPS)
    assert found.neurons == 4 * (3 + 3 + 3)
    weights = 9 * 3 * 3 + 9 * 3 * 3 + 3 * 3 + 4 * 3 * 3  # inject, trans, mix, classifier
    assert found.weight_bytes == weights and found.potential_bytes == 4 * found.neurons
    assert found.synops == 10 * 9 * 3 + 5 * (9 * 3 + 3) + 2 * 3
    assert found.cores == 1
    assert cost.estimate(form, network, "int4", spikes, STEPS).weight_bytes == weights // 2
