"""The switches of a training recipe: averages, decay of the feedback, another run's weights, the test split left
out.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

import mpisjax
from mpisjax import configuration, data
from mpisjax.analysis.measure import measure
from mpisjax.configuration import config_files, makers
from mpisjax.errors import UserError
from mpisjax.training import init_from
from mpisjax.training.metrics import read_rows
from mpisjax.training.run import assemble, evaluate_at, restore_best, run, saved_config
from mpisjax.training.state import evaluated_variables

pytestmark = pytest.mark.unoptimized


def tiny(**settings):
    """Rates, without averages; settings by dotted key, `__` for the dot."""
    few = {"forward.mode": "rates", "forward.max_steps": 3, "forward.num_steps": 3, "adjoint.max_steps": 3}
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return small_config({**few, "train.learning_rate": 0.05, "train.ema": 0.0, **given})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run with averages whose test split is left alone."""
    workdir = tmp_path_factory.mktemp("recipe") / "first"
    return workdir, run(tiny(train__ema=0.8, train__test_at_end=False), workdir)


def test_the_averages_are_those_of_their_formula(first):
    """Parameters and running statistics, against NumPy over the states of three steps."""
    config = tiny(train__ema=0.8)
    parts = assemble(config)
    train_step = makers.make_train_step(config, parts.net, parts.dataset, 19)
    state = jax.device_put(jax.device_get(parts.state))
    mean = jax.tree.map(np.asarray, jax.device_get(evaluated_variables(state)))
    for k in range(3):
        batch = parts.feed.batch(k)
        state, _ = train_step(state, jax.device_put(jax.device_get(batch)))
        now = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        rate = min(0.8, (1 + k) / (10 + k))
        mean = jax.tree.map(lambda m, n, rate=rate: rate * m + (1 - rate) * n, mean, now)
    used = jax.device_get(evaluated_variables(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), used, mean)
    moved = np.abs(used["batch_stats"]["inject"]["mean"] - now["batch_stats"]["inject"]["mean"]).max()
    assert moved > 1e-4  # the averages are not the state's own


def test_evaluation_and_the_best_checkpoint_use_the_averages(first):
    workdir, _ = first
    row = next(row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "validation")
    config = saved_config(workdir)
    parts, state, _ = restore_best(workdir, config)
    split = parts.dataset.validation
    assert evaluate_at(config, parts, state, split, None).loss == row["loss"]
    assert evaluate_at(config, parts, state._replace(ema=()), split, None).loss != row["loss"]


def test_the_test_split_is_left_alone_until_it_is_asked_for(first):
    workdir, result = first
    assert result.test is None and not (workdir / "results.json").exists()
    assert {row["kind"] for row in read_rows(workdir / "metrics.jsonl")} == {"train", "validation"}
    assert "not measured: train.test_at_end is False" in (workdir / "train.log").read_text()
    again = run(tiny(train__ema=0.8), workdir)  # the same run, now to be tested; nothing is trained again
    assert again.step == result.step and again.test["num_examples"] == 360
    assert json.loads((workdir / "results.json").read_text())["accuracy"] == again.test["accuracy"]


def test_decay_reaches_kernels_and_where_asked_the_feedbacks_gains():
    dataset = makers.make_dataset(tiny())
    net = makers.make_network(tiny(), dataset)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: makers.initial_variables(tiny(), net, dataset))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)
    for feedback in (0.0, 0.25):
        config = tiny(
            train__weight_decay=0.5,
            train__feedback_decay=feedback,
            train__momentum=0.0,
            train__warmup_epochs=0.0,
        )
        optimizer = makers.make_optimizer(config, 10)
        state = makers.init_state(config, {"params": params}, 10)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state.opt_state, params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            module, leaf = path[0].key, path[-1].key
            value = params[module][leaf]
            decay = 0.5 if leaf == "kernel" else feedback if (module, leaf) == ("trans_0", "gain") else 0.0
            np.testing.assert_allclose(update, -0.05 * decay * value, rtol=1e-6, err_msg=f"{module} {leaf}")


def test_a_first_state_holds_another_runs_averages(first):
    workdir, _ = first
    _, theirs, _ = restore_best(workdir, saved_config(workdir))
    config = tiny(train__init_from=str(workdir))
    parts = assemble(config)
    state = init_from.started_from(config.train.init_from, parts.state)
    found = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(theirs.ema))
    assert int(state.step) == 0 and state.ema == ()


@pytest.mark.slow
def test_a_run_starts_from_another_runs_averages(first, tmp_path):
    """A net trained by rates goes on as spikes: step 0 is the other's best state, its optimiser is fresh."""
    workdir, _ = first
    _, theirs, _ = restore_best(workdir, saved_config(workdir))
    config = tiny(
        train__init_from=str(workdir), forward__mode="spikes", forward__returns="spikes",
        neuron__initial_potential=0.5, train__learning_rate=1e-12, train__momentum=0.0, train__test_at_end=False,
    )  # fmt: skip
    result = run(config, tmp_path / "second")
    assert result.step == 1257 // 64
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        jax.device_get(result.state.params),
        jax.device_get(theirs.ema["params"]),
    )
    assert result.state.ema == ()
    # Gone on with from its own checkpoint, it needs the other no longer.
    moved = configuration.to_plain(config)
    assert run(configuration.from_plain(moved), tmp_path / "second").step == result.step


def test_a_run_starts_from_a_pretrained_network():
    config = config_files.load_config("digits")
    config.train.init_from, config.train.ema = "digits", 0.9
    parts = assemble(config)
    state = init_from.started_from(config.train.init_from, parts.state)
    wanted = mpisjax.load_pretrained("digits").variables
    found = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(wanted))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), found)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), jax.device_get(parts.state.opt_state))
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__init_from": "absent"}, "absent holds no checkpoint"),
        ({"train__init_from": "{first}", "model__layers": (5,)}, "of another network"),
        ({"train__feedback_decay": -1.0}, "train.feedback_decay"),
        ({"data__augment__cutout": -1}, "data.augment.cutout"),
        ({"data__augment__rotate": -1.0}, "data.augment.rotate"),
        ({"data__augment__mixup": -0.1}, "data.augment.mixup"),
        ({"forward__returns": "nonsense"}, "forward.returns"),
        ({"forward__returns": "spikes"}, "set forward.mode to 'spikes'"),
    ],
)
def test_recipes_that_cannot_be(first, tmp_path, settings, words):
    given = {key: value.format(first=first[0]) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(UserError) as told:
        run(tiny(**given), tmp_path / "run")
    assert words in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_classifier_may_be_trained_on_the_spikes_own_rates():
    """`forward.returns` decides which rates the loss sees: at T = 1 the spikes' are 0 or 1."""
    losses = {}
    for returns in ("equivalent", "spikes"):
        config = tiny(forward__mode="spikes", forward__num_steps=1, forward__returns=returns)
        parts = assemble(config)
        step = makers.make_train_step(config, parts.net, parts.dataset, 19)
        batch = jax.device_put(jax.device_get(parts.feed.batch(0)))
        losses[returns] = float(step(jax.device_put(jax.device_get(parts.state)), batch)[1].loss)
    assert abs(losses["equivalent"] - losses["spikes"]) > 1e-3, losses


def test_evaluation_counts_synaptic_operations_as_the_analysis_does(first):
    workdir, _ = first
    config = saved_config(workdir)
    parts, state, _ = restore_best(workdir, config)
    few = data.Split(parts.dataset.validation.images[:50], parts.dataset.validation.labels[:50])
    for count in (1, 4):
        score = evaluate_at(config, parts, state, few, count)
        measured, cost = measure(
            parts.net,
            jax.device_get(evaluated_variables(state)),
            parts.dataset,
            few,
            neuron=makers.make_neuron(config),
            num_steps=count,
        )
        assert score.synops == pytest.approx(sum(cost.synops.values()), rel=1e-5) and score.synops > 0
        assert score.accuracy_spikes == pytest.approx(measured.evaluation.accuracy_spikes)


def test_a_config_of_an_earlier_version_is_completed():
    config = tiny(train__ema=0.5)
    old = configuration.to_plain(config)
    del old["train"]["test_at_end"], old["forward"]["returns"], old["data"]["augment"]
    found = configuration.with_defaults(configuration.from_plain(old))
    assert found.train.test_at_end is True and found.forward.returns == "equivalent"
    assert found.train.ema == 0.5 and found.data.augment.shift == 0
