"""`mpisjax.fit`: a network of one's own trains by the loop of the command line."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import mpisjax
from mpisjax.data import DataSet, Split
from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, packing
from mpisjax.training.metrics import TIMING, read_rows

pytestmark = pytest.mark.unoptimized
RATES = mpisjax.RateForward(max_steps=4)


def digits(held_out: int = 64, classes: int = 10) -> DataSet:
    pixels, labels = load_digits(return_X_y=True)
    images, labels = (pixels * 15.9).astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int32)
    parts = [Split(images[a:b], labels[a:b]) for a, b in ((0, 512), (512, 512 + held_out), (600, 728))]
    return DataSet("some digits", classes, *parts, (0.3,), (0.4,), False, "made for a test", "0" * 64)


class Linen(nn.Module):
    """One implicit layer; with or without batch normalisation."""

    normalised: bool = True
    classes: int = 10

    def setup(self):
        self.inject, self.norm = nn.Dense(24), nn.BatchNorm(momentum=0.9)
        self.back, self.head = nn.Dense(24, kernel_init=nn.initializers.normal(0.05)), nn.Dense(self.classes)

    def initial_rates(self, images):
        return {"only": jnp.zeros((len(images), 24))}

    def encode(self, images, train):
        current = self.inject(images.reshape(len(images), -1))
        return self.norm(current, use_running_average=not train) if self.normalised else current

    def transition(self, rates, x, fire, train):
        return {"only": fire("hidden", x + self.back(rates["only"]))}

    def classify(self, rates, train):
        return self.head(rates["only"])


class Pure:
    """The like in plain JAX; its rates are one array."""

    def init(self, key, images):
        first, second = jax.random.split(key)
        weights = {
            "in": jax.random.normal(first, (64, 24)) / 8,
            "out": jax.random.normal(second, (24, 10)) / 5,
        }
        return {"params": {**weights, "back": 0.1 * jnp.eye(24)}}

    def initial_rates(self, images):
        return jnp.zeros((len(images), 24))

    def encode(self, variables, images, train):
        return images.reshape(len(images), -1) @ variables["params"]["in"], variables["batch_stats"]

    def transition(self, variables, rates, x, fire, train):
        return fire("hidden", x + rates @ variables["params"]["back"]), variables["batch_stats"]

    def classify(self, variables, rates, train):
        return rates @ variables["params"]["out"], variables["batch_stats"]


def fit(workdir, network=None, dataset=None, **settings):
    settings = {"epochs": 2, "batch_size": 64, "forward": RATES, "checkpoint_seconds": 0.0, **settings}
    settings.setdefault("eval_forward", mpisjax.SpikeForward(8))
    settings.setdefault("optimizer", lambda steps: optax.adam(optax.cosine_decay_schedule(1e-2, steps)))
    return mpisjax.fit(network or Linen(), dataset or digits(), workdir=workdir, **settings)


def leaves(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(packing.without_keys(tree)[1])]


def rows_of(workdir):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, *fit(workdir, epochs=4)


def test_it_learns_and_gathers_statistics(whole):
    workdir, variables, result = whole
    assert result.step == 32 and result.test["accuracy"] > 0.6 and result.test["num_examples"] == 128
    assert set(variables) == {"params", "batch_stats"}
    assert np.abs(variables["batch_stats"]["norm"]["mean"]).max() > 0
    assert set(result.test["firing_rates"]) == {"hidden"} and set(result.test["residual"]) == {"only"}
    assert {"metrics.jsonl", "results.json", "checkpoints"} <= {path.name for path in workdir.iterdir()}


@pytest.mark.parametrize("network", [Linen(normalised=False), Pure()], ids=["linen without statistics", "pure"])
@pytest.mark.parametrize("forward", [RATES, mpisjax.SpikeForward(4)], ids=["rates", "spikes"])
def test_networks_without_statistics(tmp_path, network, forward):
    variables, result = fit(tmp_path, network, forward=forward, epochs=3)
    assert variables["batch_stats"] == {} and result.test["accuracy"] > 0.3


def test_a_network_trains_through_time_too(tmp_path):
    from mpisjax.baselines.bptt import BPTT

    _, result = fit(tmp_path, bptt=BPTT(), forward=mpisjax.SpikeForward(4), epochs=3)
    assert result.test["accuracy"] > 0.3


def test_the_call_goes_on_where_it_was_interrupted(whole, tmp_path):
    def dies(state, metrics):
        if metrics["epoch"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(tmp_path, epochs=4, on_epoch=dies)
    variables, result = fit(tmp_path, epochs=4)
    assert leaves(variables) == leaves(whole[1]) and result.test == whole[2].test
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_more_epochs_go_on_with_a_complete_run(tmp_path, log):
    seen = []
    first = fit(tmp_path, epochs=2)[1]
    longer = fit(tmp_path, epochs=3, on_epoch=lambda state, metrics: seen.append(metrics["epoch"]))[1]
    assert first.step == 16 and longer.step == 24 and seen == [3]
    assert "complete after 2 epochs and goes on to 3" in log.text
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "test"] == [16, 24]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [8, 16, 24]
    with pytest.raises(UserError, match=r"train.epochs \(3 there, 2 here\); use .*train.init_from"):
        fit(tmp_path, epochs=2)


def test_a_run_of_fit_is_loaded_with_its_network(whole, tmp_path):
    workdir, variables, result = whole
    found = mpisjax.load(workdir, network=Linen())
    assert leaves(found.variables) == leaves(variables)
    assert found.inputs.shape == (8, 8, 1) and found.classes[3] == "class 3" and found.forward.num_steps == 8
    test = digits().test
    answers = found.predict(test.images)
    assert np.mean(answers.labels == test.labels) == result.test["accuracy"] and set(answers.steps) == {8}
    found.save(tmp_path / "mine")
    again = mpisjax.load(tmp_path / "mine", network=Linen())
    assert np.array_equal(again.predict(test.images).labels, answers.labels)
    for path in (workdir, tmp_path / "mine"):
        with pytest.raises(UserError, match=r"no settings say what .* network .*network=\.\.\."):
            mpisjax.load(path)
    with pytest.raises(UserError, match="of another network: params/head/bias"):
        mpisjax.load(workdir, network=Linen(classes=7))


def test_a_saved_network_without_statistics_is_loaded(tmp_path):
    fit(tmp_path / "run", Pure(), averaging=0.5, epochs=1)
    found = mpisjax.load(tmp_path / "run", network=Pure())
    found.save(tmp_path / "mine")
    again = mpisjax.load(tmp_path / "mine", network=Pure())
    assert again.variables["batch_stats"] == {} and leaves(again.variables) == leaves(found.variables)


def test_another_object_is_refused_by_its_name(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"fit.forward \(.*max_steps=4.* there, .*max_steps=5"):
        fit(tmp_path, epochs=1, forward=mpisjax.RateForward(max_steps=5))


@pytest.mark.parametrize(("held_out", "by_signal"), [(64, True), (0, False)])
def test_on_epoch_ends_the_training_by_true_or_by_a_signal(tmp_path, held_out, by_signal):
    def on_epoch(state, metrics):
        assert ("accuracy" in metrics) == bool(held_out)
        if by_signal and metrics["epoch"] == 2:
            raise mpisjax.StopTraining
        return metrics["epoch"] == 2

    _, result = fit(tmp_path, epochs=5, dataset=digits(held_out), on_epoch=on_epoch)
    assert result.step == 16 and not result.stopped and result.test is not None


def test_the_best_state_is_given_back(tmp_path):
    variables, result = fit(tmp_path, epochs=3, patience=0, keep_checkpoints=5)
    kept = checkpoints.read(tmp_path / checkpoints.FOLDER, result.best_step)
    best = checkpoints.restore(kept, result.state)
    assert leaves(variables["params"]) == leaves(best.params)


def test_classes_weigh_as_they_are_told(tmp_path):
    """A class whose examples weigh a thousand times less is hardly ever answered."""
    _, result = fit(tmp_path, epochs=3, class_weights=(1e-3, *(1.0,) * 9), rate_weight=0.0)
    images = digits().test
    assert result.test["accuracy"] < 1 - 0.5 * np.mean(images.labels == 0)


@pytest.mark.parametrize("weights", [(1, 2), "1,2,x", (1,) * 9 + (0,)])
def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    with pytest.raises(UserError, match=r"train.class_weights is .*: give 10 numbers above 0"):
        fit(tmp_path, class_weights=weights)


def test_what_is_no_network_is_refused(tmp_path):
    class Half:
        def init(self, key, images):
            return {"params": {}}

    with pytest.raises(UserError, match="the network Half has no initial_rates: give it the methods init"):
        fit(tmp_path, Half())
    with pytest.raises(UserError, match=r"logits of shape \[1, 7\] .* 10 classes"):
        fit(tmp_path, Linen(classes=7))
    with pytest.raises(UserError, match=r"train.patience is 2, but no examples are held out"):
        fit(tmp_path, dataset=digits(0), patience=2)


def test_the_command_line_and_fit_train_the_same_network(tmp_path):
    from mpisjax import configuration
    from mpisjax.configuration import makers
    from mpisjax.training.run import assemble, run

    config = configuration.base()
    config.model.update(stem=(4,), layers=(4,), num_streams=1, stride_layer=0, fusion_layer=1, dropout=0.1)
    config.data.num_validation, config.train.epochs, config.train.batch_size = 180, 2, 128
    config.forward.num_steps, config.data.augment.shift, config.train.ema = 4, 1, 0.9
    told = run(config, tmp_path / "command")
    parts = assemble(config)
    _, result = mpisjax.fit(
        makers.make_network(config, parts.dataset),
        parts.dataset,
        workdir=tmp_path / "fit",
        epochs=2,
        neuron=makers.make_neuron(config),
        forward=makers.make_forward(config),
        adjoint=makers.make_adjoint(config),
        optimizer=makers.make_optimizer(config, parts.feed.steps_per_epoch),
        augmentation=makers.make_augmentation(config),
        averaging=config.train.ema,
    )
    # The metrics differ, fit does not know the learning rate, so the two programs may be compiled differently.
    for ours, theirs in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(told.state.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert result.test["loss"] == pytest.approx(told.test["loss"], rel=1e-4)
