"""Networks made elsewhere: what is read runs, settles and learns as what was written; what is malformed is refused."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import random_images, random_variables

import mpisjax
from mpisjax import nn
from mpisjax.errors import UserError
from mpisjax.export import folded, nir_graph, nir_host, nir_import
from mpisjax.export.check import activity_by_step

pytestmark = pytest.mark.unoptimized
nir = pytest.importorskip("nir", reason="the nir package is not installed: pip install nir")
STEPS = 10


def written(tmp_path, neuron, stem="spikes", neurons="exact", side=8, **settings):
    """A random network as a file; what it was folded to, and images for it."""
    net = nn.MPIS(3, **{"stem": (3,), "layers": (4, 5), **settings})
    images = random_images(1, 2, side, side, 2)
    form = folded.Form(net, neuron, (side, side), stem, "spikes")
    network = folded.fold_network(form, random_variables(net, images, 0))
    nir.write(tmp_path / "net.nir", nir_graph.to_nir(form, network, neurons=neurons))
    return form, network, folded.encode(form, network, images), tmp_path / "net.nir"


@pytest.mark.parametrize(
    ("neuron", "neurons", "settings"),
    [
        (mpisjax.IF(), "exact", {"learn_threshold": True}),
        (mpisjax.LIF(0.7, 0.9, 0.3), "lif", {"stem": "host"}),
        pytest.param(mpisjax.LIF(0.7, 0.9, 0.3), "exact", {}, marks=pytest.mark.slow),
        pytest.param(mpisjax.IF(1.3, 0.0), "lif", {"side": 7}, marks=pytest.mark.slow),
        pytest.param(mpisjax.IF(), "exact", {"side": 7, "num_streams": 3}, marks=pytest.mark.slow),
    ],
)
def test_spikes_equilibrium_and_gradients_survive(x64, tmp_path, neuron, neurons, settings):
    form, network, x, path = written(tmp_path, neuron, neurons=neurons, **settings)
    there = mpisjax.from_nir(path)
    assert there.neuron.leak == neuron.leak
    ours = activity_by_step(form, network, x, STEPS)
    given = jnp.moveaxis(x, -1, 1)
    theirs = mpisjax.simulate(
        there.transition, there.params, given, there.initial_rates(2), neuron=there.neuron,
        forward=mpisjax.SpikeForward(STEPS), record=True,
    )  # fmt: skip
    assert len(ours) == len(theirs.spike_counts)
    about = nir.read(path).metadata["populations"]
    for name, spikes in ours.items():
        node = name.replace("/", "_")
        counts = nir_host.image_of(np.asarray(theirs.spike_counts[f"{node}_spikes"]), about[node])
        np.testing.assert_array_equal(counts, spikes.sum(0), err_msg=name)

    forward = mpisjax.RateForward("picard", max_steps=400, tol=1e-12)
    adjoint = mpisjax.Adjoint("neumann", max_steps=400, tol=1e-12)

    def scores_there(params):
        eq = mpisjax.equilibrium_forward(
            there.transition, params, given, there.initial_rates(2), neuron=there.neuron, forward=forward,
            adjoint=adjoint,
        )  # fmt: skip
        return eq.rates["output"].reshape(2, -1)

    def scores_here(network):
        eq = mpisjax.equilibrium_forward(
            folded.transition(form), network, x, form.initial_rates(2), neuron=neuron, forward=forward,
            adjoint=adjoint,
        )  # fmt: skip
        return folded.classify(form, network, eq.rates)

    network = jax.tree.map(lambda a: jnp.asarray(a, float), network)

    def slopes(scores, params):
        """Gradient of a loss, and the scores that it is of."""
        return jax.jit(jax.grad(lambda p: (jnp.sum(jnp.sin(s := scores(p))), s), has_aux=True))(params)

    here, scores = slopes(scores_here, network)
    found, scores_found = slopes(scores_there, there.params)
    here = here.layers
    np.testing.assert_allclose(scores_found, scores, atol=1e-8)
    # Every pixel's inject is one kernel here, and a kernel for each phase there: their biases' gradients sum up.
    bias = np.asarray(found["inject"]["bias"]) if settings.get("stem") != "host" else None
    if bias is not None:
        np.testing.assert_allclose(bias.reshape(-1, 4).sum(0), here.inject.bias, atol=1e-6)
    last = np.asarray(found["classifier"]["weight"]).transpose(2, 3, 1, 0).reshape(-1, 3)
    np.testing.assert_allclose(last, here.classifier.kernel, atol=1e-6)
    assert np.any(last) and np.any(np.asarray(found["stream2_trans"]["weight"]))


def test_fine_tuned_weights_are_written_back(x64, tmp_path):
    *_, path = written(tmp_path, mpisjax.IF())
    there = mpisjax.from_nir(path)
    params = jax.tree.map(lambda a: 1.1 * a, there.params)
    nir.write(tmp_path / "new.nir", nir_import.with_params(there, params))
    again = mpisjax.from_nir(str(tmp_path / "new.nir"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), again.params, params)


def chain(**changes):
    """A small network written by hand: dense, IF, dense, with feedback."""
    nodes = {
        "input": nir.Input(input_type=np.array([3])),
        "in": nir.Affine(weight=np.ones((2, 3)) / 4, bias=np.zeros(2)),
        "neurons": nir.IF(r=np.ones(2), v_threshold=np.ones(2), v_reset=np.zeros(2)),
        "before": nir.Delay(delay=np.ones(2)),
        "back": nir.Linear(weight=np.full((2, 2), 0.1)),
        "output": nir.Output(output_type=np.array([2])),
    }
    edges = [("input", "in"), ("in", "neurons"), ("neurons", "before"), ("before", "back")]
    edges += [("back", "neurons"), ("neurons", "output")]
    return nir.NIRGraph({**nodes, **changes}, edges, type_check=False)


def test_a_network_written_by_hand_settles():
    there = mpisjax.from_nir(chain(), reset="subtract")
    x = jnp.array([[0.2, 0.3, 0.9]])
    eq = mpisjax.equilibrium_forward(
        there.transition, there.params, x, there.initial_rates(1), neuron=there.neuron,
        forward=mpisjax.RateForward("picard", max_steps=50, tol=1e-7),
    )  # fmt: skip
    np.testing.assert_allclose(eq.rates["output"], 0.35 / (1 - 0.2), rtol=1e-5)


def broken(change):
    graph = copy.deepcopy(chain())
    change(graph)
    return graph


def no_delay(graph):
    graph.edges = [e for e in graph.edges if "before" not in e] + [("neurons", "back")]
    del graph.nodes["before"]


def not_a_number(graph):
    graph.nodes["in"].weight[0, 1] = np.nan


def unknown(graph):
    graph.nodes["neurons"] = nir.CubaLIF(*(np.ones(2) for _ in range(5)))


def shapes(graph):
    graph.nodes["back"].weight = np.ones((5, 2))


def narrow(graph):
    graph.nodes["in"].weight = np.ones((2, 4))


def huge(graph):
    graph.nodes["input"] = nir.Input(input_type=np.array([2**20, 2**20]))


def two_steps(graph):
    graph.nodes["before"].delay[:] = 2


def stray(graph):
    graph.edges.append(("nowhere", "neurons"))


def silent(graph):
    graph.nodes["neurons"].v_threshold[:] = -1


def alone(graph):
    graph.nodes["neurons"] = nir.Threshold(threshold=np.ones(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_delay, "cycle without a Delay"),
        (not_a_number, "weight of the node 'in' holds values that are not finite"),
        (unknown, "'neurons' is a CubaLIF, which is not read"),
        (shapes, "cannot be added"),
        (narrow, "shapes of the graph do not fit"),
        (huge, "'input' has more than"),
        (two_steps, "'before' is not of 1 step"),
        (stray, "'nowhere', which the graph does not have"),
        (silent, "threshold of 'neurons' is not above 0"),
        (alone, "follows no potential"),
    ],
)
def test_malformed_graphs_are_refused_in_a_sentence(change, words):
    with pytest.raises(UserError, match=words) as refused:
        mpisjax.from_nir(broken(change), reset="subtract")
    assert "\n" not in str(refused.value)


def test_neurons_that_reset_to_a_value_are_refused():
    with pytest.raises(UserError, match="give reset='subtract'"):
        mpisjax.from_nir(chain())
    with pytest.raises(UserError, match="choose 'subtract'"):
        mpisjax.from_nir(chain(), reset="zero")


def test_files_that_are_none_are_refused(tmp_path):
    import h5py

    (tmp_path / "text.nir").write_text("no graph")
    with h5py.File(tmp_path / "other.nir", "w") as file:
        file["numbers"] = np.ones(3)
    with h5py.File(tmp_path / "huge.nir", "w") as file:  # a kilobyte that unpacks to terabytes
        file.create_dataset("node/w", (2**20, 2**20), "f4", chunks=(1024, 1024), compression="gzip")
    for name, words in (("text", "cannot be read"), ("other", "no sound NIR graph"), ("huge", "numbers")):
        with pytest.raises(UserError, match=words) as refused:
            mpisjax.from_nir(tmp_path / f"{name}.nir")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        mpisjax.from_nir(tmp_path / "missing.nir")


def _mutated_bytes(rng, data):
    """A file with up to eight bytes changed, a piece left out, or its end cut off."""
    data = bytearray(data)
    kind = rng.integers(3)
    if kind == 0:
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            data[at] = rng.integers(256)
    elif kind == 1:
        start = rng.integers(0, len(data))
        del data[start : start + rng.integers(1, 200)]
    else:
        del data[rng.integers(0, len(data)) :]
    return bytes(data)


def _mutated_graph(rng):
    """A graph with one edge or node gone, doubled or turned round, or one array of another shape, type or value."""
    graph = copy.deepcopy(chain())
    names = list(graph.nodes)
    kind = rng.integers(5)
    if kind == 0:
        del graph.nodes[names[rng.integers(len(names))]]
    elif kind == 1:
        source, target = graph.edges.pop(rng.integers(len(graph.edges)))
        graph.edges += [(target, source), (names[rng.integers(len(names))], target)]
    elif kind == 2:
        a, b = (names[i] for i in rng.integers(0, len(names), 2))
        graph.nodes[a], graph.nodes[b] = graph.nodes[b], graph.nodes[a]
    else:
        node = graph.nodes[names[rng.integers(len(names))]]
        arrays = [field for field, value in vars(node).items() if isinstance(value, np.ndarray)]
        if arrays:
            field = arrays[rng.integers(len(arrays))]
            value = getattr(node, field)
            hostile = (
                value[None], value.reshape(-1)[:1], value.astype(str), value * 1j, np.full(value.shape, np.inf), -value,
                value.astype(object), np.zeros((0, *value.shape)), np.float64(1e30),
            )  # fmt: skip
            setattr(node, field, hostile[rng.integers(len(hostile))])
    return graph


@pytest.mark.parametrize("what", ["bytes", "graph"])
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path, what):
    nir.write(tmp_path / "sound.nir", chain())
    sound, path = (tmp_path / "sound.nir").read_bytes(), tmp_path / "mutated.nir"
    refused = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        if what == "bytes":
            path.write_bytes(_mutated_bytes(rng, sound))
        try:
            there = mpisjax.from_nir(path if what == "bytes" else _mutated_graph(rng), reset="subtract")
        except UserError as error:  # any other exception fails the test
            assert "\n" not in str(error)
            refused += 1
        else:
            for leaf in jax.tree.leaves(there.params):
                assert np.isfinite(leaf).all(), seed
    assert 20 < refused < 120
