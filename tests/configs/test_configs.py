"""Every config file and variant: it builds, its network has the size that its header says, and it refuses what it does
not know.

No data is needed: shapes alone are computed.
"""

import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mpisjax import configuration, nn
from mpisjax.configuration import config_files, makers, rules
from mpisjax.data import prepare_images
from mpisjax.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "configs"
# Side, channels, classes, whether input is over time.
SHAPES = {
    "digits": (8, 1, 10, False),
    "mnist": (28, 1, 10, False),
    "fashion_mnist": (28, 1, 10, False),
    "cifar10": (32, 3, 10, False),
    "cifar100": (32, 3, 100, False),
    "nmnist": (34, 2, 10, True),
    "saccade_digits": (34, 2, 10, True),
    "folder": (32, 3, 3, False),
    "arrays": (8, 1, 10, False),
    "recordings": (34, 2, 10, True),
    "shd": (1, 700, 20, True),
    "ssc": (1, 700, 35, True),
}
OF_THE_HEADER = 0.005  # a header's count may be off by this share: for parameters too few to be of interest
OF_THE_PAPER = 0.05  # ours against the paper's: what an injection into the second stream would make up
# Variant ("-" for none), parameters, the paper's ("no row", or "133K" perhaps with an accuracy).
ROW = re.compile(r"^(-|\w+) +([\d,]+) +(no row|\?|[\d.]+[KM])", re.MULTILINE)
FILES = sorted(FOLDER.glob("*.py"))


def rows(path: Path) -> list[tuple[str | None, int, str]]:
    """What a header says: variant, parameters, the paper's parameters."""
    header = path.read_text().split('"""')[1]
    return [(None if v == "-" else v, int(n.replace(",", "")), p) for v, n, p in ROW.findall(header)]


def config_of(path: Path, variant: str | None) -> configuration.ml_collections.ConfigDict:
    """As the command line loads it."""
    return config_files.load_config(f"{path}:{variant}" if variant else str(path))


def data_of(config: configuration.ml_collections.ConfigDict) -> SimpleNamespace:
    """What a network and a step ask of the data, with one input's shape."""
    side, channels, classes, temporal = SHAPES[config.data.name]
    side = config.data.crop or side
    frames = (config.data.num_frames,) if temporal else ()
    return SimpleNamespace(
        num_classes=classes,
        temporal=temporal,
        steps_per_frame=1,
        shape=(*frames, side, side, channels),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )


def parameters_of(config: configuration.ml_collections.ConfigDict) -> int:
    """The parameter count, without computing any of them."""
    dataset = data_of(config)
    net, neuron = makers.make_network(config, dataset), makers.make_neuron(config)

    def initial() -> dict:
        images = prepare_images(jnp.zeros((1, *dataset.shape), jnp.uint8), dataset)
        return nn.init_variables(net, jax.random.key(0), images, neuron)

    return nn.parameter_count(jax.eval_shape(initial))


EVERY = [pytest.param(path, *row, id=f"{path.stem}-{row[0]}") for path in FILES for row in rows(path)]


@pytest.mark.parametrize(("path", "variant", "count", "paper"), EVERY)
def test_network_has_the_size_its_header_says(path, variant, count, paper):
    ours = parameters_of(config_of(path, variant))
    assert ours == pytest.approx(count, rel=OF_THE_HEADER)
    if paper[-1] in "KM":
        assert ours == pytest.approx(float(paper[:-1]) * {"K": 1e3, "M": 1e6}[paper[-1]], rel=OF_THE_PAPER)


@pytest.mark.parametrize(("path", "variant", "count", "paper"), EVERY)
def test_settings_build(path, variant, count, paper):
    del count, paper
    config = config_of(path, variant)
    rules.check(config)
    assert config.name == (f"{path.stem}_{variant}" if variant else path.stem)
    temporal = data_of(config).temporal
    forward = makers.make_forward(config, temporal)
    if variant and (steps := re.search(r"t(\d+)$", variant)):
        assert forward.num_steps == int(steps[1])
    if config.forward.mode == "spikes" and not temporal:
        assert forward.num_steps == config.forward.num_steps
    makers.make_adjoint(config)
    makers.make_optimizer(config, steps_per_epoch=10)
    # The schedule falls from its top only if the run is longer than its warm-up.
    assert config.train.warmup_epochs < config.train.epochs


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_header_has_every_variant_and_a_command(path):
    said = [variant for variant, _, _ in rows(path)]
    module = runpy.run_path(str(path))
    assert said == [None, *module.get("VARIANTS", {})]
    assert f"python train.py --config configs/{path.name}" in module["__doc__"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_unknown_variant_is_refused(path):
    with pytest.raises(UserError, match="no variant 'no_such'"):
        config_of(path, "no_such")


def test_refusal_lists_the_known_variants():
    with pytest.raises(UserError, match="choose from t30, t100, large_t1, ide_t30, low, or leave it out"):
        config_of(FOLDER / "fashion_mnist.py", "t3")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_has_the_base_keys_and_no_others(path):
    def keys(tree, prefix=""):
        for key, value in tree.items():
            yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]

    assert set(keys(config_of(path, None))) == set(keys(configuration.base()))


@pytest.mark.parametrize("override", ["--config.train.epoch=3", "--config.model.layer=(3,)", "--config.nothing=1"])
def test_unknown_key_is_refused(override):
    with pytest.raises(UserError, match="there is no setting"):
        config_files.apply_overrides(config_of(FOLDER / "cifar10.py", "t10"), [override])


@pytest.mark.parametrize("settings", [{"train.epoch": 3}, {"nothing": 1}, {"seed.x": 1}, {"train.epochs": "many"}])
def test_variant_cannot_set_what_is_no_setting(settings):
    with pytest.raises(UserError, match=re.escape(next(iter(settings)))):
        configuration.with_variant(configuration.base(), {"v": settings}, "v")


def test_misspelt_setting_in_a_file_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mpisjax import configuration\n"
        "def get_config():\n"
        "    c = configuration.base()\n"
        "    c.train.epoch = 3\n"
        "    return c\n"
    )
    with pytest.raises(UserError, match=r"line 4 of .* fails"):
        config_files.load_config(str(path))


def test_variants_leave_one_another_alone():
    path = FOLDER / "cifar100.py"
    small, large = config_of(path, "small_t5"), config_of(path, None)
    assert math.prod(small.model.layers) < math.prod(large.model.layers)
    assert large.forward.mode == "rates"
