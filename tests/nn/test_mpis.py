"""The network's shapes, sizes and refusals; what is in the loop; dropout's masks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_nets import NEURON, random_images, random_variables

import mpisjax
from mpisjax import nn
from mpisjax.firing import RateReading

pytestmark = pytest.mark.unoptimized


def shapes(net, *images):
    """(rates' shapes, logits' shape) of one pass, without computing it."""
    images = jax.ShapeDtypeStruct(images, jnp.float32)

    def run(key, images):
        variables = nn.init_variables(net, key, images, NEURON)
        out = nn.apply(net, variables, images, neuron=NEURON, forward=mpisjax.RateForward(max_steps=1))
        return out.equilibrium.rates, out.logits

    rates, logits = jax.eval_shape(run, jax.random.key(0), images)
    return {k: r.shape for k, r in rates.items()}, logits.shape


@pytest.mark.parametrize("head", ["fused", "smallest"])
@pytest.mark.parametrize("temporal", [False, True])
def test_the_sizes_of_three_streams(head, temporal):
    net = nn.MPIS(num_classes=5, stem=(2,), layers=(3, 4), num_streams=3, head=head, temporal=temporal)
    time = (2,) if temporal else ()
    rates, logits = shapes(net, *time, 2, 28, 28, 1)
    assert rates == {"stream1": (2, 14, 14, 4), "stream2": (2, 7, 7, 4), "stream3": (2, 4, 4, 4)}
    assert logits == (2, 5)
    rates, logits = shapes(net, *time, 2, 7, 9, 1)
    assert rates == {"stream1": (2, 4, 5, 4), "stream2": (2, 2, 3, 4), "stream3": (2, 1, 2, 4)}
    assert logits == (2, 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_streams": 1}, {"stream1": (1, 6, 5, 4)}),
        (
            {"num_streams": 1, "layers": (4,), "fusion_layer": 1, "stride_layer": 0},
            {"stream1": (1, 11, 9, 4)},
        ),
        ({"num_streams": 2, "stride_layer": 0}, {"stream1": (1, 11, 9, 4), "stream2": (1, 6, 5, 4)}),
        ({"stem": (), "stem_strides": ()}, {"stream1": (1, 6, 5, 4), "stream2": (1, 3, 3, 4)}),
        ({"stem": (2, 2), "stem_strides": (2, 2)}, {"stream1": (1, 2, 2, 4), "stream2": (1, 1, 1, 4)}),
        ({"layers": (3, 3, 4), "stride_layer": 3}, {"stream1": (1, 6, 5, 4), "stream2": (1, 3, 3, 4)}),
    ],
    ids=str,
)
def test_sizes_of_other_networks(settings, expected):
    net = nn.MPIS(num_classes=2, **{"stem": (2,), "layers": (3, 4), **settings})
    assert shapes(net, 1, 11, 9, 1) == (expected, (1, 2))


@pytest.mark.parametrize("fusion", [1, 2, 3])
def test_every_stream_hears_every_other_at_every_fusion_layer(fusion):
    net = nn.MPIS(num_classes=2, stem=(), stem_strides=(), layers=(2, 2, 2), num_streams=3, fusion_layer=fusion)
    images = random_images(0, 1, 8, 8, 1)
    variables = random_variables(net, images, seed=1)
    rates = jax.tree.map(lambda r: r + 0.5, net.initial_rates(images))

    def step(rates):
        # Without a bound, so that none hides an influence.
        return net.apply(variables, rates, images, lambda name, u: u, False, method="transition")

    J = jax.jacrev(step)(rates)
    for i in rates:
        for j in rates:
            assert jnp.abs(J[i][j]).max() > 1e-7, f"{i} does not hear {j}"


def test_only_the_first_stream_is_injected_and_one_stream_has_no_fusion():
    net = nn.MPIS(num_classes=2, stem=(), stem_strides=(), layers=(2, 2), num_streams=2, fusion_layer=2)
    images = random_images(0, 1, 8, 8, 1)
    variables = random_variables(net, images, seed=1)
    seen = {}

    def fire(name, current):
        seen[name] = current
        return RateReading(NEURON)(name, current)

    def run(images):
        seen.clear()
        rates = net.initial_rates(images)
        net.apply(variables, rates, images, fire, False, method="transition")
        return dict(seen)

    one, two = run(images), run(2 * images)
    assert (one["stream1/layer1"] != two["stream1/layer1"]).any()
    np.testing.assert_array_equal(one["stream2/layer1"], two["stream2/layer1"])
    assert sorted(one) == [f"stream{i}/layer{k}" for i in (1, 2) for k in (1, 2)]
    single = nn.MPIS(num_classes=2, layers=(2, 2), num_streams=1)
    assert not [
        k
        for k in jax.eval_shape(lambda: nn.init_variables(single, jax.random.key(0), images, NEURON))["params"]
        if "down" in k
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_streams": 0}, "model.num_streams is 0"),
        ({"layers": ()}, "model.layers"),
        ({"layers": (3, 0)}, "model.layers"),
        ({"fusion_layer": 0}, "model.fusion_layer is 0"),
        ({"fusion_layer": 3}, "model.fusion_layer is 3"),
        ({"stride_layer": 1}, "model.stride_layer is 1"),
        ({"stride_layer": 3}, "model.stride_layer is 3"),
        ({"stem": (3, 3)}, "model.stem"),
        ({"kernel_size": 2}, "model.kernel_size is 2"),
        ({"kernel_size": 0}, "model.kernel_size is 0"),
        ({"head": "largest"}, "model.head is 'largest'"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_a_sentence(settings, named):
    with pytest.raises(mpisjax.UserError, match=re.escape(named)) as caught:
        nn.MPIS(num_classes=2, **settings)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def convolutions(text):
    return len(re.findall(r"conv_general_dilated\[", text))


def body_of_the_scan(net, images):
    variables = random_variables(net, images, seed=0)
    jaxpr = jax.make_jaxpr(
        lambda v, i: (
            nn.spikes(net, v, i, neuron=NEURON, forward=mpisjax.SpikeForward(None if net.temporal else 4)).rates
        )
    )(variables, images)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1
    return str(scans[0].params["jaxpr"])


def test_the_loop_holds_the_recurrent_convolutions_and_no_other_work_on_weights():
    net = nn.MPIS(num_classes=2, stem=(2,), layers=(3, 4), num_streams=2)
    body = body_of_the_scan(net, random_images(0, 1, 8, 8, 1))
    # Trans and layer 2 of both streams, one D; neither stem nor injection, no weight norm, no flipped kernel.
    assert convolutions(body) == 5
    for name in ("sqrt", "rev[", "optimization_barrier", "transpose["):
        assert name not in body, name
    frames = nn.MPIS(num_classes=2, stem=(2,), layers=(3, 4), num_streams=2, temporal=True)
    body = body_of_the_scan(frames, random_images(0, 3, 1, 8, 8, 1))
    assert convolutions(body) == 7 and "sqrt" not in body


def test_dropout_draws_one_mask_a_sample_and_channel_of_the_right_mean():
    net = nn.MPIS(num_classes=2, layers=(30, 40), num_streams=2, dropout=0.25)
    masks = nn.sample_masks(net, jax.random.key(0), 50)
    assert {k: m.shape for k, m in masks.items()} == {
        f"stream{i}_layer{k}": (50, 1, 1, c) for i in (1, 2) for k, c in ((1, 30), (2, 40))
    }
    flat = ravel_pytree(masks)[0]
    np.testing.assert_allclose(np.unique(flat), [0, 1 / 0.75], rtol=1e-6)
    assert flat.mean() == pytest.approx(1, abs=0.03)
    assert len({m.tobytes() for m in (np.asarray(m)[..., :30] for m in masks.values())}) == 4
    assert nn.sample_masks(nn.MPIS(num_classes=2), jax.random.key(0), 3) == {}


def test_dropout_acts_in_training_alone_and_by_its_key():
    net = nn.MPIS(num_classes=2, stem=(2,), layers=(3, 4), dropout=0.5)
    images = random_images(0, 2, 6, 6, 1)
    variables = random_variables(net, images, seed=0)

    @jax.jit
    def train(key):
        return nn.apply(
            net, variables, images, neuron=NEURON, forward=mpisjax.SpikeForward(5), train=True, rng=key
        ).logits

    a, again, b = (train(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


def test_half_precision_keeps_parameters_and_statistics_whole():
    net = nn.MPIS(num_classes=2, stem=(2,), layers=(3, 4), dtype=jnp.bfloat16)
    images = random_images(0, 2, 6, 6, 1)
    variables = random_variables(net, images, seed=0)

    def loss(params):
        out = nn.apply(
            net,
            {**variables, "params": params},
            images,
            neuron=NEURON,
            forward=mpisjax.SpikeForward(8),
            train=True,
        )
        return jnp.sum(out.logits**2), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert {r.dtype for r in out.equilibrium.rates.values()} == {jnp.dtype(jnp.bfloat16)}
    assert out.logits.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves((grads, out.batch_stats))} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(ravel_pytree(grads)[0]).all()


def test_spikes_record_every_population():
    net = nn.MPIS(num_classes=2, stem=(2,), layers=(3, 4), temporal=True)
    images = random_images(0, 4, 2, 6, 6, 1)
    variables = random_variables(net, images, seed=0)
    found = jax.jit(lambda v: nn.spikes(net, v, images, neuron=NEURON, forward=mpisjax.SpikeForward(None)))(variables)
    assert sorted(found.layer_rates) == ["stem/layer1"] + [f"stream{i}/layer{k}" for i in (1, 2) for k in (1, 2)]
    for i in (1, 2):
        np.testing.assert_array_equal(found.layer_rates[f"stream{i}/layer2"], found.rates[f"stream{i}"])
    np.testing.assert_allclose(found.spike_counts["stem/layer1"], 4 * found.layer_rates["stem/layer1"], rtol=1e-6)


def test_without_feedback_one_pass_is_the_equilibrium():
    net = nn.MPIS(3, stem=(3,), layers=(4, 5), feedback_norm="none")
    images = random_images(7, 2, 8, 8, 1)
    variables = random_variables(net, images, 8)
    assert not any(name.startswith("trans") for name in variables["params"])

    def solved(variables):
        forward = mpisjax.RateForward(max_steps=1)
        out = nn.apply(net, variables, images, neuron=NEURON, forward=forward, adjoint=mpisjax.Adjoint(max_steps=1))
        return jnp.sum(out.logits**2), (out.logits, out.equilibrium.residual)

    def one_pass(variables):
        x = net.apply(variables, images, False, method="encode")
        reading = RateReading(NEURON)
        rates = net.apply(variables, net.initial_rates(images), x, reading, False, method="transition")
        logits = net.apply(variables, rates, False, method="classify")
        return jnp.sum(logits**2), logits

    (_, (logits, residual)), gradient = jax.jit(jax.value_and_grad(solved, has_aux=True))(variables)
    (_, direct), plain = jax.jit(jax.value_and_grad(one_pass, has_aux=True))(variables)
    np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-6)
    assert all(float(jnp.max(value)) < 1e-6 for value in residual.values())
    np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(plain)[0], rtol=1e-4, atol=1e-5)
