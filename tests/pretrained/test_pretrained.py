"""Networks that come with the package: what their cards promise, and what happens to damaged files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import mpisjax
from mpisjax import configuration, data, pretrained, weights
from mpisjax.configuration import config_files
from mpisjax.errors import UserError
from mpisjax.pretrained import save
from mpisjax.pretrained.__main__ import training_command
from mpisjax.training.run import evaluate_at, run

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits():
    return mpisjax.load_pretrained("digits")


@pytest.mark.parametrize("name", pretrained.available())
def test_every_network_is_whole_small_and_documented(name):
    found = mpisjax.load_pretrained(name)
    path = weights.FOLDER / f"{name}.safetensors"
    assert path.stat().st_size == found.card["bytes"] <= save.MAX_BYTES
    assert found.card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    training = found.card["training"]
    assert training["command"].startswith("python train.py") and len(training["commit"]) == 40
    assert {"date", "machine", "seed", "seconds", "best_epoch", "environment"} <= training.keys()
    assert found.card["validation"]["accuracy"] > 0.5 and found.card["test"]["accuracy"] > 0.5
    assert found.card["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(found.params))
    assert len(found.inputs.classes) == found.inputs.num_classes == found.net.num_classes
    text = path.with_suffix(".json").read_text()
    assert found.config.data.dir == found.config.data.cache_dir == ""
    assert not re.search(r'["\s=]/', text)  # no absolute path: nobody else has the maker's folders


def accuracy(found, images, labels, **how):
    return np.mean(np.argmax(found.apply(found.variables, images, **how).logits, -1) == labels)


def test_apply_classifies_bytes_and_any_stated_range(digits):
    test = data.load("digits").test
    images, labels = np.asarray(test.images[:50]), test.labels[:50]
    assert accuracy(digits, images, labels) >= 0.94
    for given, value_range in (
        (images, (0, 255)),
        (images.tolist(), (0, 255)),
        (images / 255, (0, 1)),
        ((images / 255 * 16).round().astype(np.int8), (0, 16)),
        (images / 127.5 - 1, (-1, 1)),
    ):
        assert accuracy(digits, given, labels, value_range=value_range) >= 0.94
    light = accuracy(digits, images > 127, labels, value_range=(0, 1))
    assert light > 0.6  # black and white alone lose something


@pytest.mark.parametrize(
    ("images", "value_range", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), None, "reads uint8 pixels and was given float32"),
        (np.zeros((2, 8, 8, 1), bool), None, "given bool"),
        (np.zeros((2, 8, 8, 1), np.int8), None, "given int8"),
        (np.zeros((2, 8, 8), np.uint8), None, r"shape \[batch, 8, 8, 1\] and was given \[2, 8, 8\]"),
        (np.zeros((8, 8, 1), np.uint8), None, r"images\[None\]"),
        (np.zeros((2, 28, 28, 1), np.uint8), None, r"was given \[2, 28, 28, 1\]"),
        (np.zeros((2, 8, 8, 1)), (1, 0), r"value_range is \(1, 0\)"),
        (np.zeros((2, 8, 8, 1)), (0, np.inf), "two finite numbers"),
    ],
)
def test_what_the_network_cannot_read_is_refused_when_it_is_traced(digits, images, value_range, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda x: digits.apply(digits.variables, x, value_range), images)


X64 = """
import jax, mpisjax, numpy as np
from mpisjax import data
found = mpisjax.load_pretrained("digits")
test = data.load("digits").test
logits = jax.jit(found.apply)(found.variables, test.images[:100]).logits
assert jax.config.jax_enable_x64
assert {leaf.dtype.name for leaf in jax.tree.leaves(found.variables)} == {"float32"}
print(np.mean(np.argmax(logits, -1) == test.labels[:100]))
"""


def test_networks_are_loaded_and_used_in_double_precision_programs(python):
    done = python("-c", X64, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 0.94


@pytest.mark.optimized
def test_the_digits_network_reaches_what_its_card_says(digits):
    """On the test split, by the evaluation that wrote the card."""
    parts, state, step = pretrained.restore(digits, digits.config)
    score = evaluate_at(digits.config, parts, state, parts.dataset.test, None)
    assert step == digits.card["training"]["steps"]
    assert score.accuracy == pytest.approx(digits.card["test"]["accuracy"], abs=1.5 / 360)
    assert score.accuracy_spikes == pytest.approx(digits.card["test"]["accuracy_spikes"], abs=1.5 / 360)
    assert score.synops == pytest.approx(digits.card["test"]["synops"], rel=1e-3)


def copy_of_digits(folder: Path) -> Path:
    for suffix in ("safetensors", "json"):
        (folder / f"digits.{suffix}").write_bytes((weights.FOLDER / f"digits.{suffix}").read_bytes())
    return folder / "digits.safetensors"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append"])
def test_damaged_weights_are_refused(tmp_path, damage):
    path = copy_of_digits(tmp_path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:-7],
            "empty": b"",
            "append": whole + b"\0",
        }[damage]
    )
    with pytest.raises(UserError, match="cut short or altered") as told:
        mpisjax.load_pretrained("digits", tmp_path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\0"])
def test_a_card_that_is_none_is_refused(tmp_path, text):
    path = copy_of_digits(tmp_path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(UserError, match="is not a card"):
        mpisjax.load_pretrained("digits", tmp_path)


def test_missing_and_foreign_networks_are_told(tmp_path):
    with pytest.raises(UserError, match="no pretrained network 'nonsense'.*there are: .*digits"):
        mpisjax.load_pretrained("nonsense")
    path = copy_of_digits(tmp_path)
    card = json.loads(path.with_suffix(".json").read_text())
    arrays = safetensors.numpy.load(path.read_bytes())
    arrays["params/inject/kernel"] = arrays["params/inject/kernel"][..., :-1].copy()
    path.write_bytes(safetensors.numpy.save(arrays))
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"another network.*inject"):
        mpisjax.load_pretrained("digits", tmp_path)


ABOUT = {"command": "c", "commit": "d", "machine": "m", "date": "2026-01-02"}


def test_what_is_saved_is_what_is_loaded(digits, tmp_path):
    path = save.save(digits._replace(name="again"), tmp_path / "new" / "again", ABOUT, "n")
    again = mpisjax.load_pretrained("again", tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, again.variables, digits.variables)
    assert again.inputs == digits.inputs and configuration.to_plain(again.config) == configuration.to_plain(
        digits.config
    )
    training = again.card["training"]
    assert again.card["note"] == "n" and {key: training[key] for key in ABOUT} == ABOUT
    assert path.with_suffix(".json").exists() and len(list(path.parent.iterdir())) == 2
    large = digits._replace(params={**digits.params, "more": np.zeros(save.MAX_BYTES // 4, np.float32)})
    with pytest.raises(UserError, match="more than the 2,000,000"):
        save.save(large, tmp_path / "large", ABOUT)
    assert not (tmp_path / "large.safetensors").exists()


def test_kernels_in_half_precision_lose_nothing_more_when_they_are_stored(digits, tmp_path):
    params = {**digits.params, "tall": np.full((2, 2), 1e6, np.float32)}  # beyond float16: stays as it is
    rounded = weights.rounded({**digits.variables, "params": params})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2**-11, 6e-8), rounded["params"], params)
    assert rounded["params"]["tall"] is params["tall"]
    kept = digits._replace(**weights.rounded(digits.variables))
    save.save(kept, tmp_path / "half", ABOUT)
    found = mpisjax.load_pretrained("half", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.variables, kept.variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.variables)} == {np.dtype(np.float32)}
    assert found.card["bytes"] < 0.6 * digits.card["bytes"]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_name_that_exists_is_refused(digits, tmp_path, suffix):
    taken = tmp_path / f"digits{suffix}"
    taken.write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"digits{suffix} exists; choose another name"):
        save.save(digits, tmp_path / "digits", ABOUT)
    assert taken.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [taken]


def test_a_card_has_no_folder_of_its_maker(digits, tmp_path):
    moved = digits.config.copy_and_resolve_references()
    moved.train.init_from, moved.data.dir = "/somewhere/else/first", "/somewhere"
    card = {**digits.card, "config": configuration.to_plain(moved)}
    path = save.save(digits._replace(card=card, config=moved), tmp_path / "again", ABOUT)
    assert "somewhere" not in path.with_suffix(".json").read_text()
    assert "init_from=runs/first" in training_command(moved)


def test_the_training_command_leads_back_to_the_config():
    config = config_files.load_config(str(ROOT / "configs" / "digits.py"))
    assert training_command(config) == "python train.py"
    config = config_files.load_config(f"{ROOT / 'configs' / 'fashion_mnist.py'}:t30")
    config.data.dir, config.train.epochs, config.model.layers = "/somewhere", 3, (8, 12)
    command = training_command(config).split(" ")
    assert command[:4] == ["python", "train.py", "--config", "configs/fashion_mnist.py:t30"]
    again = config_files.load_config(f"{ROOT / 'configs' / 'fashion_mnist.py'}:t30")
    overrides = [item.strip("'") for item in command[4:]]
    assert len(overrides) == 2 and not any("somewhere" in item for item in overrides)
    again = config_files.apply_overrides(again, overrides)
    assert again.train.epochs == 3 and again.model.layers == (8, 12)


@pytest.mark.slow
def test_a_run_becomes_a_network(tmp_path):
    config = config_files.load_config(str(ROOT / "configs" / "digits.py"))
    config.model.update(stem=(4,), layers=(4,), num_streams=1, fusion_layer=1, stride_layer=0)
    config.forward.num_steps, config.train.epochs, config.train.ema = 2, 1, 0.5
    result = run(config, tmp_path / "run")
    save.save(save.from_run(tmp_path / "run"), tmp_path / "tiny", ABOUT)
    found = mpisjax.load_pretrained("tiny", tmp_path)
    assert found.card["test"] == json.loads((tmp_path / "run" / "results.json").read_text())
    assert found.config.model.layers == (4,) and found.inputs.shape == (8, 8, 1)
    averages = jax.device_get(result.state.ema)
    jax.tree.map(np.testing.assert_array_equal, found.variables, averages)  # what evaluation uses
    with pytest.raises(UserError, match="holds no checkpoint"):
        save.from_run(tmp_path / "nothing")


@pytest.mark.slow
def test_the_command_makes_a_network_and_evaluate_py_measures_it(python, tmp_path):
    """From `train.py` to `evaluate.py`, as a user would type it."""
    overrides = ["--config.model.stem=(4,)", "--config.model.layers=(4,)", "--config.model.num_streams=1",
                 "--config.model.fusion_layer=1", "--config.model.stride_layer=0", "--config.forward.num_steps=2",
                 "--config.train.epochs=1"]  # fmt: skip
    trained = python("train.py", "--workdir", tmp_path / "run", *overrides)
    assert trained.returncode == 0, trained.stderr
    made = python("-m", "mpisjax.pretrained", "--workdir", tmp_path / "run", "--name", "tiny", "--out", tmp_path)
    assert made.returncode == 0, made.stderr
    found = mpisjax.load_pretrained("tiny", tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found.card["test"] == results and found.config.model.layers == (4,)
    assert found.card["early_exit"]["confidence"] > 0 and found.card["early_exit"]["mean_steps"] <= 2
    assert "--config.forward.num_steps=2" in found.card["training"]["command"]
    said = python("evaluate.py", "--pretrained", "absent")
    assert said.returncode == 1 and said.stderr.startswith("error: there is no pretrained network 'absent'")
    lost = python("-m", "mpisjax.pretrained", "--workdir", tmp_path / "none", "--name", "x", "--out", tmp_path)
    assert lost.returncode == 1 and "holds no checkpoint" in lost.stderr and lost.stderr.count("\n") == 1
    half = python(
        "-m", "mpisjax.pretrained", "--workdir", tmp_path / "run", "--name", "half", "--out", tmp_path,
        "--weights", "float16",
    )  # fmt: skip
    assert half.returncode == 0, half.stderr
    found = mpisjax.load_pretrained("half", tmp_path)
    assert abs(found.card["test"]["accuracy"] - results["accuracy"]) < 0.02 and results != found.card["test"]
