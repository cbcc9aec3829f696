"""NIR: written to a file, read back, and run by a simulator that knows nothing of mpisjax: spike for spike."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import random_images, random_variables

import mpisjax
from mpisjax import nn
from mpisjax.errors import UserError
from mpisjax.export import folded, nir_graph, nir_host, nir_nodes, polyphase
from mpisjax.export.nir_host import Simulator, convolve
from mpisjax.firing import RateReading
from mpisjax.nn import mpis
from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved, upsample
from mpisjax.simulate import over_time

pytestmark = pytest.mark.unoptimized

nir = pytest.importorskip("nir", reason="the nir package is not installed: pip install nir")
STEPS = 12


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def depth_to_space(grid: np.ndarray, phases: int, size: tuple[int, int]) -> np.ndarray:
    """The image of that size from its grid, as the host puts it together."""
    about = {"phases": phases, "channels": grid.shape[-1] // phases**2, "height": size[0], "width": size[1]}
    return nir_host.image_of(np.moveaxis(grid, -1, 1), about)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 3), (2, 1)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_every_linear_map_is_a_convolution_on_the_grid(x64, size, kernel, phases):
    """Convolutions of both strides, their transposes and upsampling, against the network's own."""

    def on(weights, image):  # a stride-1 convolution of the grid, by NumPy
        node = nir.Conv2d(
            input_shape=None, weight=weights.transpose(3, 2, 0, 1), stride=1, padding=weights.shape[0] // 2,
            dilation=1, groups=1, bias=np.zeros(weights.shape[3]),
        )  # fmt: skip
        return np.moveaxis(convolve(np.moveaxis(image, -1, 1), node), 1, -1)

    image = random(2, *size, 3)
    for stride in (1, 2):
        coarse = tuple(halved(n, stride - 1) for n in size)
        grid = tuple(-(-n // (stride * phases)) for n in size)
        w = random(kernel, kernel, 3, 4)
        wanted = conv2d(jnp.asarray(image), jnp.asarray(w), stride)
        found = on(
            polyphase.conv_kernel(w, stride, size, phases),
            polyphase.space_to_depth(image, stride * phases, grid),
        )
        np.testing.assert_allclose(depth_to_space(found, phases, coarse), wanted, atol=1e-12)

        small = random(2, *coarse, 4)
        wanted = conv_transpose2d(jnp.asarray(small), jnp.asarray(w), stride, size)
        found = on(
            polyphase.transposed_kernel(w, stride, size, phases),
            polyphase.space_to_depth(small, phases, grid),
        )
        np.testing.assert_allclose(depth_to_space(found, stride * phases, size), wanted, atol=1e-12)

        wanted = upsample(jnp.asarray(small), stride, size)
        found = on(polyphase.upsampling_kernel(4, stride, phases), polyphase.space_to_depth(small, phases, grid))
        np.testing.assert_allclose(depth_to_space(found, stride * phases, size), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [8, 7, 5, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_an_image_enters_the_grid(x64, size, stride, phases):
    image, w = random(2, size, size, 3), random(3, 3, 3, 4)
    out = -(-size // stride)
    grid = -(-out // phases)
    kernel, stride_on_grid, padding = polyphase.input_kernel(w, stride, size, grid, phases)
    node = nir.Conv2d(
        input_shape=(size, size), weight=kernel.transpose(3, 2, 0, 1), stride=stride_on_grid, padding=padding,
        dilation=1, groups=1, bias=np.zeros(kernel.shape[3]),
    )  # fmt: skip
    assert list(node.output_type["output"]) == [4 * phases**2, grid, grid]
    gridded = np.moveaxis(convolve(np.moveaxis(image, -1, 1), node), 1, -1)
    wanted = conv2d(jnp.asarray(image), jnp.asarray(w), stride)
    np.testing.assert_allclose(depth_to_space(gridded, phases, (out, out)), wanted, atol=1e-12)


def test_the_simulator_shares_no_code_with_ours():
    tree = ast.parse(Path(nir_host.__file__).read_text())
    found = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found == {"__future__", "graphlib", "collections", "collections.abc", "typing", "numpy"}


def spikes_of(net, variables, images, neuron):
    """Our own spikes, every step and population, by the network's transition."""
    transition = nn.transition_of(net)
    x = net.apply(variables, images, False, method="encode")

    @jax.jit
    def run(x):
        return over_time(
            transition,
            variables,
            x,
            net.initial_rates(images),
            neuron=neuron,
            num_steps=None if net.temporal else STEPS,
            observer=lambda seen, step: (seen, {k: p.activity for k, p in step.populations.items()}),
            start=lambda shapes: None,
            time_axis=0 if net.temporal else None,
        )[1]

    activity = {k: np.asarray(spikes) for k, spikes in run(x).items()}
    steps = len(next(iter(activity.values())))
    return np.asarray(x), [{k: spikes[t] for k, spikes in activity.items()} for t in range(steps)]


def check_round_trip(net, images, neuron, tmp_path, neurons="exact", seed=0, stem="host", head="host"):
    """Write, read, simulate, compare every spike of every step with the unfolded network's own."""
    variables = random_variables(net, images, seed)
    form = folded.Form(net, neuron, images.shape[-3:-1], stem, head)
    network = folded.fold_network(form, variables)
    graph = nir_graph.to_nir(form, network, neurons=neurons, about={"name": "small"})
    nir.write(tmp_path / "net.nir", graph)
    read = nir.read(tmp_path / "net.nir")
    assert {type(node).__name__ for node in read.nodes.values()} <= {
        "Input", "Output", "Conv2d", "Scale", "I", "LI", "Threshold", "Delay", "IF", "LIF",
    }  # fmt: skip
    given, drawn = np.asarray(images), net
    if stem == "spikes" and not net.temporal:  # a constant image over time drives the same neurons as frames
        drawn, given = net.clone(temporal=True), np.repeat(given[None], STEPS, 0)
    x, wanted = spikes_of(drawn, variables, jnp.asarray(given), neuron)
    if not drawn.temporal:
        x = np.asarray(net.apply(variables, x, method=lambda m, x: m.inject(x, False)))
    batch = images.shape[1 if net.temporal else 0]
    simulator = Simulator(read, batch, x.dtype)
    fired = dict.fromkeys(wanted[0], 0)
    outputs = []
    for t, ours in enumerate(wanted):
        values = simulator.step(np.moveaxis(x[t] if drawn.temporal else x, -1, 1))
        for name, spikes in ours.items():
            theirs = np.moveaxis(values[f"{name.replace('/', '_')}_spikes"], 1, -1)
            about = read.metadata["populations"][name.replace("/", "_")]
            phases, size = int(about["phases"]), (int(about["height"]), int(about["width"]))
            image = depth_to_space(theirs, phases, size)
            np.testing.assert_array_equal(image, spikes, err_msg=f"{name}, step {t}")
            assert theirs.sum() == image.sum()  # nothing fires outside the image
            fired[name] += image.sum()
        outputs.append({n: values[n] for n in values if n in read.nodes})
    sizes = {name: spikes.size * len(wanted) for name, spikes in wanted[0].items()}
    assert all(0.005 < fired[name] / sizes[name] < 0.95 for name in fired), fired  # the test sees something
    return variables, read, outputs, wanted


NETS = {
    "learned thresholds": {"num_streams": 2, "learn_threshold": True},
    "one stream": {"num_streams": 1},
    "two streams": {"num_streams": 2},
    "fused at layer 1": {"num_streams": 2, "fusion_layer": 1},
    "three streams": {"num_streams": 3, "layers": (3, 4, 3), "fusion_layer": 2, "stride_layer": 3},
    "no stride": {"num_streams": 2, "stride_layer": 0},
    "bounded feedback": {"num_streams": 1, "feedback_norm": "spectral"},
    "no feedback": {"num_streams": 2, "fusion_layer": 1, "feedback_norm": "none"},
    "kernels of 5": {"num_streams": 2, "kernel_size": 5},
}


QUICK = ("learned thresholds",)
CASES = [pytest.param(n, 7, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NETS]


@pytest.mark.parametrize(("name", "side"), [pytest.param("two streams", 8, marks=pytest.mark.slow), *CASES])
def test_spikes_survive_the_round_trip(x64, tmp_path, name, side):
    net = nn.MPIS(**{"num_classes": 3, "stem": (3,), "layers": (4, 5), **NETS[name]})
    check_round_trip(net, random_images(1, 2, side, side, 2), mpisjax.IF(), tmp_path)


@pytest.mark.parametrize("neuron", [mpisjax.LIF(0.7, 0.9), mpisjax.LIF(1.3, 0.8, 0.5), mpisjax.LIF(1.0, 1.0, 0.5)])
def test_leak_threshold_and_initial_potential(x64, tmp_path, neuron):
    net = nn.MPIS(3, stem=(3,), layers=(4, 5))
    check_round_trip(net, random_images(2, 2, 6, 6, 2), neuron, tmp_path)


@pytest.mark.parametrize("neuron", [mpisjax.LIF(0.7, 1.0, 0.0), mpisjax.LIF(0.7, 0.9, 0.0), mpisjax.LIF(0.7, 0.9, 0.5)])
def test_single_nodes_that_are_told_to_subtract(x64, tmp_path, neuron):
    net = nn.MPIS(3, stem=(3,), layers=(4, 5))
    check_round_trip(net, random_images(3, 2, 7, 7, 2), neuron, tmp_path, neurons="lif")


STEMS = [
    {"stem": (3, 4), "stem_strides": (2, 2)},
    pytest.param({"stem": (3,), "stem_strides": (1,)}, marks=pytest.mark.slow),
    pytest.param({"stem": (), "stem_strides": ()}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("stem", STEMS)
def test_frames_go_in_as_they_are(x64, tmp_path, stem):
    net = nn.MPIS(3, layers=(4, 5), temporal=True, **stem)
    check_round_trip(net, 2 * random_images(4, 10, 2, 14, 14, 2), mpisjax.IF(), tmp_path)


@pytest.mark.parametrize("side", [8, pytest.param(9, marks=pytest.mark.slow)])
def test_the_stem_fires(x64, tmp_path, side):
    net = nn.MPIS(3, stem=(3, 4), stem_strides=(1, 2), layers=(4, 5))
    images = 2 * random_images(6, 2, side, side, 2)
    check_round_trip(net, images, mpisjax.IF(), tmp_path, stem="spikes")


@pytest.mark.parametrize("streams", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_head_fires_and_its_dense_layer_scores(x64, tmp_path, streams):
    """The head's neurons in NumPy, driven by the unfolded network's own head and spikes."""
    net, neuron = nn.MPIS(3, num_streams=streams, stem=(3,), layers=(4, 5)), mpisjax.IF()
    images = random_images(5, 2, 9, 9, 2)
    variables, _, outputs, wanted = check_round_trip(net, images, neuron, tmp_path, head="spikes")
    seen = []

    def current(m, rates):  # what the head's DBReLU is given
        original, mpis.dbrelu = mpis.dbrelu, lambda u: (seen.append(u), u)[1]
        try:
            return m.classify(rates, False)
        finally:
            mpis.dbrelu = original

    u, fired = 0.5, 0
    for step, ours in zip(outputs, wanted, strict=True):
        rates = {f"stream{i + 1}": jnp.asarray(ours[f"stream{i + 1}/layer2"]) for i in range(streams)}
        net.apply(variables, rates, method=current)
        u = u + np.asarray(seen[-1])
        spikes = (u >= 1).astype(float)
        u = u - spikes
        np.testing.assert_array_equal(np.moveaxis(step["head_spikes"], 1, -1), spikes)
        dense = variables["params"]["classifier"]
        logits = spikes.reshape(2, -1) @ dense["kernel"] + dense["bias"]
        np.testing.assert_allclose(step["output"].reshape(2, -1), logits, atol=1e-12)
        fired += spikes.sum()
    assert fired


@pytest.mark.parametrize(("head", "part"), [("fused", "host"), ("smallest", "spikes"), ("smallest", "host")])
def test_from_pixels_to_scores_with_what_the_file_holds(x64, tmp_path, head, part):
    """The host's stem and head and the graph, from uint8 pixels, against `classify` of our own simulation."""
    net, neuron = nn.MPIS(3, stem=(3,), stem_strides=(2,), layers=(4, 5), head=head), mpisjax.IF()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 2), np.uint8)
    mean, std = np.array([0.4, 0.5]), np.array([0.2, 0.3])
    images = jnp.asarray((pixels / 255 - mean) / std)
    variables = random_variables(net, images, 0)
    form = folded.Form(net, neuron, (9, 9), "host", part)
    network = folded.fold_network(form, variables)
    graph = nir_graph.to_nir(form, network, pixels={"mean": mean, "std": std}, about={"name": "small"})
    nir.write(tmp_path / "net.nir", graph)
    read = nir.read(tmp_path / "net.nir")
    assert json.loads(read.metadata["about"]) == {"name": "small"}
    found = nir_host.run(read, pixels, STEPS)
    simulation = nn.spikes(net, variables, images, neuron=neuron, forward=mpisjax.SpikeForward(STEPS))
    wanted = net.apply(variables, simulation.rates, False, method="classify")
    np.testing.assert_allclose(found.scores, wanted, atol=1e-10)
    for name, count in simulation.spike_counts.items():
        np.testing.assert_array_equal(found.spikes[name.replace("/", "_")], count.reshape(2, -1).sum(1))


def test_an_unrolled_graph_is_that_many_passes_of_the_rate_map(x64, tmp_path):
    """Without feedback and without noise: its neurons' rates, after many steps, are those of K Picard steps."""
    net, neuron = nn.MPIS(3, stem=(3,), layers=(4, 5)), mpisjax.IF()
    images = random_images(7, 2, 8, 8, 2)
    variables = random_variables(net, images, 0)
    form = folded.Form(net, neuron, (8, 8), "host", "spikes")
    network = folded.fold_network(form, variables)
    graph = nir_graph.to_nir(form, network, neurons="lif", unrolled=3)
    nir.write(tmp_path / "net.nir", graph)
    read = nir.read(tmp_path / "net.nir")
    assert not any(isinstance(node, nir.Delay) for node in read.nodes.values())
    x = folded.encode(form, network, images)
    simulator, total, steps = Simulator(read, 2, x.dtype), 0, 1500
    for _ in range(steps):
        total = total + simulator.step(np.moveaxis(np.asarray(x), -1, 1))["output"].reshape(2, -1)
    rates = form.initial_rates(2)
    for _ in range(3):
        rates = folded.transition(form)(network, rates, x, RateReading(neuron))
    wanted = folded.classify(form, network, rates)
    np.testing.assert_allclose(total / steps, wanted, atol=0.05)
    assert np.abs(folded.classify(form, network, form.initial_rates(2)) - wanted).max() > 0.3


@pytest.mark.parametrize(
    ("settings", "neuron", "shape", "options", "words"),
    [
        ({}, mpisjax.IF(), (8, 6, 1), {}, "square"),
        ({"dtype": jnp.bfloat16}, mpisjax.IF(), (8, 8, 1), {}, "bfloat16"),
        ({"neurons": ("lif", "ternary")}, mpisjax.IF(), (8, 8, 1), {}, "'ternary', whose spikes have other values"),
        ({"neurons": ("graded3", "lif")}, mpisjax.IF(), (8, 8, 1), {}, "'graded3', whose spikes have other values"),
        ({}, mpisjax.IF(), (8, 8, 1), {"unrolled": 2}, "head"),
        ({}, mpisjax.IF(), (8, 8, 1), {}, "1,000 weights"),
    ],
)
def test_networks_that_cannot_be_written_are_refused(monkeypatch, settings, neuron, shape, options, words):
    monkeypatch.setattr(nir_nodes, "MAX_WEIGHTS", 1000)
    net = nn.MPIS(3, stem=(3,), **{"layers": (4, 5), **settings})
    variables = jax.tree.map(
        lambda a: jnp.ones(a.shape, a.dtype),
        jax.eval_shape(lambda: nn.init_variables(net, jax.random.key(0), jnp.zeros((1, *shape)), neuron)),
    )
    form = folded.Form(net, neuron, shape[:2], "host", "host")
    with pytest.raises(UserError, match=words):
        nir_graph.check(form)
        nir_graph.to_nir(form, folded.fold_network(form, variables), **options)
