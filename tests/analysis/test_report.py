"""The HTML report: complete, self-contained, and true to the run."""

import base64
import html.parser
import json
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import mpisjax
from mpisjax import configuration, nn
from mpisjax.analysis import figures
from mpisjax.analysis.dynamics import raster
from mpisjax.analysis.report import Subject, write_report
from mpisjax.configuration import makers
from mpisjax.training.state import initial_variables

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def run():
    config = configuration.base()
    config.name = "a <run> & its name"
    config.model.update({"stem": (3,), "layers": (4, 5), "num_streams": 1, "fusion_layer": 1, "head": "smallest"})
    config.forward.num_steps = 6
    config.eval.batch_size = 16
    dataset = makers.make_dataset(config)
    net = makers.make_network(config, dataset)
    init = jax.jit(lambda key: nn.init_variables(net, key, jnp.zeros((2, 8, 8, 1)), mpisjax.IF()))
    return config, net, init(jax.random.key(0)), dataset


def subject_of(config, net, variables, dataset):
    return Subject(
        name=config.name,
        method=config.train.method,
        net=net,
        variables=variables,
        neuron=makers.make_neuron(config),
        num_steps=config.forward.num_steps,
        solver=makers.make_evaluation_solver(config),
        evaluations=config.forward.max_steps,
        through_time=None,
        settings=configuration.to_plain(config),
        classes=tuple("0123456789"),
    )


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        elif "src" in values or "href" in values:
            self.links.append(tag)

    def handle_data(self, text):
        self.text += text


@pytest.mark.slow
def test_page_is_whole_and_needs_no_other_file(run, tmp_path):
    subject, dataset = subject_of(*run), run[-1]
    rows = [{"kind": "train", "step": s, "loss": 1 / s, "accuracy": 0.5, "learning_rate": 0.1} for s in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "report.html"
    (tmp_path / "plots").mkdir()
    write_report(
        subject,
        dataset,
        dataset.test,
        tmp_path,
        path,
        steps=(2, 4),
        examples=20,
        figure_folder=tmp_path / "plots",
    )
    page = Page()
    page.feed(path.read_text())
    plots = {file.stem: file.read_bytes() for file in (tmp_path / "plots").iterdir()}
    assert {"loss", "accuracy", "learning_rate"} < plots.keys() and len(plots) == 13
    assert not page.links and len(page.images) == 13
    for uri in page.images:
        kind, _, encoded = uri.partition(",")
        assert kind == "data:image/svg+xml;base64" and base64.b64decode(encoded) in plots.values()
    for name, svg in plots.items():
        tags = [one.tag.rpartition("}")[2] for one in xml.etree.ElementTree.fromstring(svg).iter()]
        assert tags.count("path") + tags.count("image") > 4 and len(svg) < 200_000, name
    assert "a <run> & its name" in page.text and "the first 20 of" in page.text
    assert all(words in page.text for words in ("Horowitz", "million SynOps", "stream1/layer2", "in every step"))
    # Without a log of training the page does without its curves.
    (tmp_path / "metrics.jsonl").unlink()
    write_report(subject, dataset, dataset.test, tmp_path, path, steps=(), examples=8)
    page = Page()
    page.feed(path.read_text())
    assert len(page.images) == 8  # no curves of training, and nothing to compare


class Own(linen.Module):
    """A network of one's own, with a product inside a loop if asked."""

    looped: bool = False

    def setup(self):
        self.inject, self.back, self.head = linen.Dense(12), linen.Dense(12), linen.Dense(10)

    def initial_rates(self, images):
        return jnp.zeros((len(images), 12))

    def encode(self, images, train):
        return self.inject(images.reshape(len(images), -1))

    def transition(self, rates, x, fire, train):
        current = x + 0.1 * self.back(rates)
        if self.looped:
            current = jax.lax.fori_loop(0, 1, lambda i, c: c @ jnp.eye(12), current)
        return fire("hidden", current)

    def classify(self, rates, train):
        return self.head(rates)


@pytest.mark.slow
@pytest.mark.parametrize("looped", [False, True])
def test_the_page_of_a_network_of_ones_own_has_energy_where_its_products_are_known(run, tmp_path, looped):
    config, _, _, dataset = run
    net = nn.as_module(Own(looped))
    variables = initial_variables(net, 0, (8, 8, 1), mpisjax.LIF())
    path = tmp_path / "report.html"
    subject = subject_of(config, net, variables, dataset)
    write_report(subject, dataset, dataset.test, tmp_path, path, steps=(2, 4), examples=20)
    page = Page()
    page.feed(path.read_text())
    assert len(page.images) == (9 if looped else 10) and "Own, 1,066 parameters" in page.text
    assert ("million SynOps" in page.text) == ("Horowitz" in page.text) == (not looped)
    assert "spikes alone" in page.text


def test_raster_holds_the_simulation_s_spikes(run):
    _, net, variables, dataset = run
    images = jnp.asarray(np.asarray(dataset.test.images[:1]), jnp.float32) / 4
    neuron = mpisjax.IF()
    spikes = raster(net, variables, images, neuron, 7)
    counts = nn.spikes(net, variables, images, neuron=neuron, forward=mpisjax.SpikeForward(7)).spike_counts
    assert list(spikes) == ["stream1/layer1", "stream1/layer2"]
    for name, fired in spikes.items():
        np.testing.assert_array_equal(fired.sum(0), np.ravel(counts[name]))
    assert sum(f.sum() for f in spikes.values()) > 0


def test_raster_of_a_silent_population_is_drawn():
    assert figures.raster({"a": np.zeros((5, 9), bool), "b": np.ones((5, 9), bool)}).axes
