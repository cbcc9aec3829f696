"""Use of what was trained: one object from a run, from a file and from the package, and what it predicts."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import mpisjax
import mpisjax.pretrained.trace
from mpisjax import configuration, pretrained
from mpisjax.configuration import config_files, makers
from mpisjax.errors import UserError
from mpisjax.training.run import run

pytestmark = pytest.mark.unoptimized


class OneLayer(nn.Module):
    """A network of one's own, which is no MPIS."""

    classes: int

    def setup(self):
        self.inject, self.head = nn.Dense(24), nn.Dense(self.classes)
        self.back = nn.Dense(24, kernel_init=nn.initializers.normal(0.05))

    def initial_rates(self, images):
        return {"only": jnp.zeros((len(images), 24))}

    def encode(self, images, train):
        return self.inject(images.reshape(len(images), -1))

    def transition(self, rates, x, fire, train):
        return {"only": fire("hidden", x + self.back(rates["only"]))}

    def classify(self, rates, train):
        return self.head(rates["only"])


def one_layer(dataset, config):
    """For `model.name`; it may look at what examples are like."""
    assert dataset.train.images.shape[1:] == (8, 8, 1)
    return OneLayer(dataset.num_classes)


@pytest.fixture(scope="module")
def digits():
    trained = mpisjax.load_pretrained("digits")
    return trained, makers.make_dataset(trained.config).test


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run of one epoch, and its data."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = config_files.load_config("digits")
    config.model.update(stem=(4,), layers=(4,), num_streams=1, fusion_layer=1, stride_layer=0)
    config.forward.num_steps, config.train.epochs, config.devices.all_cores = 2, 1, False
    result = run(config, folder)
    return folder, result, makers.make_dataset(config)


def test_a_prediction_is_the_answer_that_apply_gives(digits):
    trained, test = digits
    found = trained.predict(test.images[:30], batch_size=16)
    out = jax.jit(trained.apply)(trained.variables, test.images[:30])
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(out.logits), atol=2e-3)
    assert found.labels.tolist() == np.argmax(out.logits, -1).tolist()
    assert found.classes == tuple(str(n) for n in found.labels) and trained.classes == tuple("0123456789")
    assert (found.steps == 16).all() and np.mean(found.labels == test.labels[:30]) >= 0.9
    np.testing.assert_allclose(found.confidence, found.probabilities.max(1))
    counted = pretrained.trace.trace(trained, test.images[0]).spikes_until(16)
    assert abs(found.spikes[0] - counted) <= 4  # two programs may round a current differently


def test_one_image_or_many_bytes_or_floats_or_paths(digits, tmp_path):
    trained, test = digits
    images = np.asarray(test.images[:3])
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[:, :, 0]).save(path)
    expected = trained.predict(images)
    forms = (
        images[..., 0],
        images / 255,
        images[..., 0] / 127.5 - 1,
        images.tolist(),
        paths,
        [str(p) for p in paths],
    )
    ranges = (None, (0, 1), (-1, 1), (0, 255), None, None)
    for given, value_range in zip(forms, ranges, strict=True):
        found = trained.predict(given, value_range=value_range)
        assert found.classes == expected.classes
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=0.05)
    for one in (images[1], images[1, :, :, 0], paths[1], str(paths[1])):
        assert trained.predict(one).classes == expected.classes[1:2]
    for nothing in (images[:0], []):
        found = trained.predict(nothing)
        assert found.classes == () and found.probabilities.shape == (0, 10) and found.steps.shape == (0,)


def test_answers_that_are_sure_come_early(digits):
    trained, test = digits
    images, labels = np.asarray(test.images[:100]), test.labels[:100]
    whole = trained.predict(images)
    early = trained.predict(images, confidence=0.8)
    assert early.steps.mean() < 8 and early.spikes.mean() < whole.spikes.mean() / 2
    assert np.mean(early.labels == labels) >= np.mean(whole.labels == labels) - 0.02
    stopped = early.steps < 16
    assert (early.confidence[stopped] >= 0.8).all() and len(set(early.steps)) > 3
    # An answer after t steps is that of a simulation of t steps, by spikes alone.
    shown = pretrained.trace.trace(trained, images[0], int(early.steps[0]))
    np.testing.assert_allclose(early.probabilities[0], shown.scores[-1], atol=0.02)
    assert abs(early.spikes[0] - shown.spikes_until(16)) <= 4
    assert (trained.predict(images[:4], confidence=1.0).steps == 16).all()
    assert (trained.predict(images[:4], num_steps=5, confidence=1.0).steps == 5).all()


def test_frames_are_predicted_and_early_too():
    trained = mpisjax.load_pretrained("saccade_digits")
    test = makers.make_dataset(trained.config).test
    images = np.asarray(test.images[:8])
    found = trained.predict(images)
    assert np.mean(found.labels == test.labels[:8]) >= 0.75 and (found.steps == 10).all()
    assert trained.predict(images[0]).classes == found.classes[:1]
    assert trained.predict(images, confidence=0.3).steps.min() < 10
    with pytest.raises(UserError, match="num_steps is 5: leave it out, frames bring"):
        trained.predict(images, num_steps=5)


@pytest.mark.parametrize(
    ("images", "named", "words"),
    [
        (np.zeros((2, 8, 8, 1)), {}, "reads uint8 pixels and was given float64"),
        (np.zeros((2, 9, 8, 1), np.uint8), {}, r"was given \[2, 9, 8, 1\]"),
        (np.zeros(8, np.uint8), {}, "shape"),
        (np.zeros((8, 8), np.uint8), {"confidence": 1.5}, "confidence is 1.5: give a probability"),
        (np.zeros((8, 8), np.uint8), {"num_steps": 0}, "num_steps is 0: leave it out, a simulation needs"),
        ("absent.png", {}, "there is no image absent.png"),
    ],
)
def test_what_cannot_be_predicted_is_told(digits, images, named, words):
    with pytest.raises(UserError, match=words):
        digits[0].predict(images, **named)


def test_a_run_is_loaded_saved_and_loaded_again(small_run, tmp_path, monkeypatch):
    folder, result, dataset = small_run
    trained = mpisjax.load(folder)
    assert type(trained) is type(mpisjax.load_pretrained("digits")) is mpisjax.Trained
    found = trained.predict(dataset.test.images)
    assert np.mean(found.labels == dataset.test.labels) == pytest.approx(result.test["accuracy"], abs=1.5 / 360)
    assert trained.name == "small" and trained.config.model.layers == (4,)
    path = trained.save(tmp_path / "networks" / "mine", note="a note")
    assert path == tmp_path / "networks" / "mine.safetensors"
    for given in (path, str(path.with_suffix(""))):
        again = mpisjax.load(given)
        jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)
        assert again.inputs == trained.inputs and again.card["note"] == "a note" and again.name == "mine"
        assert configuration.to_plain(again.config)["model"] == configuration.to_plain(trained.config)["model"]
    with pytest.raises(UserError, match=r"mine.safetensors exists; choose another name"):
        trained.save(path)
    with pytest.raises(UserError, match=r"mine.json exists"):
        path.unlink()
        trained.save(path)

    # What the network reads is kept in the run's folder: the data are not needed any more.
    def gone(config):
        raise UserError("no data here")

    monkeypatch.setattr("mpisjax.configuration.makers.make_dataset", gone)
    assert mpisjax.load(folder).predict(dataset.test.images).classes == found.classes
    kept = folder / "inputs.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "data_checksum": "of other data"}))
    with pytest.raises(UserError, match="no data here"):
        mpisjax.load(folder)
    kept.unlink()


def test_a_run_with_a_network_of_ones_own_is_used_like_any(tmp_path):
    config = config_files.load_config("digits")
    config.model.name, config.forward.mode, config.train.warmup_epochs = f"{__name__}:one_layer", "rates", 0.0
    config.train.epochs, config.forward.num_steps, config.devices.all_cores = 2, 8, False
    result = run(config, tmp_path / "run")
    trained, test = mpisjax.load(tmp_path / "run", trust=True), makers.make_dataset(config).test
    found = trained.predict(test.images)
    assert np.mean(found.labels == test.labels) == pytest.approx(result.test["accuracy"], abs=1.5 / 360)
    assert (found.novelty < 1).mean() > 0.9 and (found.steps == 8).all()
    early = trained.predict(test.images, confidence=0.2)
    assert early.steps.min() < 8 and (early.confidence[early.steps < 8] >= 0.2).all()


def test_what_is_no_run_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run and no network digits; mpisjax.load_pretrained\('digits'\)"):
        mpisjax.load("digits")
    with pytest.raises(UserError, match="no run and no network runs/none$"):
        mpisjax.load("runs/none")
    (tmp_path / "digits").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        mpisjax.load("digits")
