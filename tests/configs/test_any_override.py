"""Any `--config.KEY=VALUE` on the real settings: it is taken, and what it stands for can be made, or it is told in one
line.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.digits import get_config
from mpisjax import cli, configuration
from mpisjax.configuration import config_files, makers, rules
from mpisjax.data import DataSet, Split
from mpisjax.errors import UserError
from mpisjax.training.loss import class_weights_of

ROOT = Path(__file__).resolve().parents[2]


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        found += leaves(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return found


EMPTY = Split(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int32))
DATASET = DataSet("made up", 10, EMPTY, EMPTY, EMPTY, (0.0,), (1.0,), False, "", "")
KEYS = sorted(leaves(configuration.base()))
VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-inf", "-1", "0", "1", "1e400", "1e-400", "2", "0.5"]),
    st.sampled_from(["True", "None", "()", "(1,)", "(0,)", "(-1, 2)", "('a',)", "((1,),)"]),
    st.sampled_from(["spikes", "rates", "implicit", "bptt", "phantom", "step", "float32", "lion", "balanced"]),
    st.sampled_from(["os.path:join", "a.b:c", "1,2"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(max_size=20),
)  # fmt: skip


def make(config: ml_collections.ConfigDict) -> None:
    """Everything that a run makes of a config before it computes."""
    rules.check(config)
    makers.make_network(config, DATASET)
    makers.make_neuron(config)
    makers.make_forward(config)
    makers.make_spike_forward(config)
    makers.make_evaluation_solver(config)
    makers.make_adjoint(config)
    makers.make_bptt(config)
    makers.make_optimizer(config, 19)
    class_weights_of(config.train.class_weights, DATASET)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_any_override_of_a_real_setting(items):
    config = get_config()
    try:
        overrides = config_files.sort_arguments([f"--config.{key}={value}" for key, value in items]).overrides
        make(config_files.apply_overrides(config, overrides))
    except UserError as error:
        sentence = cli.explain(error)
        assert sentence and "\n" not in sentence and "\r" not in sentence


def test_kinds_of_neuron_are_names():
    config = config_files.apply_overrides(get_config(), ["--config.model.neurons=('lif','ternary')"])
    rules.check(config)
    assert makers.make_network(config, DATASET).neurons == ("lif", "ternary")
    with pytest.raises(UserError, match=r"model.neurons is \(1, 2\): give kinds of neuron"):
        rules.check(config_files.apply_overrides(config, ["--config.model.neurons=(1,2)"]))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_very_many_overrides(items):
    test_any_override_of_a_real_setting.hypothesis.inner_test(items)


BROKEN = st.tuples(st.integers(0, 2000), st.integers(0, 40), st.text(max_size=12))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(BROKEN, min_size=1, max_size=3))
def test_any_broken_config_file(tmp_path_factory, places):
    """The digits' file with parts cut out and others put in: it gives a config, or one line says why not."""
    text = (ROOT / "configs" / "digits.py").read_text()
    for place, length, inserted in places:
        place %= len(text) + 1
        text = text[:place] + inserted + text[place + length :]
    path = tmp_path_factory.mktemp("broken") / "broken.py"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        make(config_files.load_config(str(path)))
    except UserError as error:
        sentence = cli.explain(error)
        assert sentence and "\n" not in sentence
