"""What settings name becomes an object: optimisers, schedules, a network of one's own; and what a step does with
them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import Linen, digits

import mpisjax
from mpisjax import configuration
from mpisjax.configuration import makers, rules
from mpisjax.data import Feed, prepare_images
from mpisjax.errors import UserError
from mpisjax.nn import as_module, model
from mpisjax.training import loss, step
from mpisjax.training.state import cosine, init_state, initial_variables, step_decay

pytestmark = pytest.mark.unoptimized

OWN = """
import optax
from test_fit import Linen

def network(dataset, config):
    return Linen(classes=dataset.num_classes)

def adam(schedule):
    return optax.adam(schedule)

def nothing(schedule):
    return None

def falling(rate, steps):
    return optax.linear_schedule(rate, 0.0, steps)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `mine` in the working folder."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return tmp_path


def moved(optimizer, weights):
    """Where one step takes weights whose gradient is one."""
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, weights), optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_optimizers_decay_kernels_alone(name):
    config = configuration.base()
    config.train.optimizer, config.train.weight_decay, config.train.warmup_epochs = name, 0.5, 0.0
    weights = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full(2, 10.0)}
    new = moved(makers.make_optimizer(config, 10), weights)
    step_of_bias, step_of_kernel = 10 - new["bias"][0], 10 - new["kernel"][0, 0]
    assert 0 < step_of_bias < step_of_kernel
    rate = config.train.learning_rate
    if name != "sgd":  # the direction is a sign in the first step; the decay is added to it
        assert step_of_bias == pytest.approx(rate, rel=1e-3)
        assert step_of_kernel == pytest.approx(rate * (1 + 0.5 * 10), rel=1e-3)


def test_schedules_rise_and_fall():
    rates = np.array([cosine(0.4, 20, warmup_steps=4)(n) for n in range(21)])
    assert rates[:5] == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4], rel=1e-5) and rates[20] == pytest.approx(0)
    assert (np.diff(rates[4:]) < 0).all()
    steps = [float(step_decay(1.0, 10, milestones=(0.5,), decay=0.1)(n)) for n in (0, 4, 6)]
    assert steps == pytest.approx([1.0, 1.0, 0.1])


def test_functions_of_the_working_folder_are_found(own):
    config = configuration.base()
    config.train.optimizer, config.train.schedule, config.model.name = (
        "mine:adam",
        "mine:falling",
        "mine:network",
    )
    rules.check(config)
    assert float(makers.make_schedule(config, 10)(50)) == pytest.approx(0.05)
    assert isinstance(makers.make_optimizer(config, 10), optax.GradientTransformation)
    network = makers.make_network(config, digits())
    assert network.network == Linen()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.optimizer", "adam", "choose sgd, adamw, lion or package.module:function"),
        ("train.schedule", "linear", "choose cosine, step or package.module:function"),
        ("model.name", "resnet", "choose mpis or package.module:function"),
        ("train.optimizer", "mine:absent", "mine defines no function absent"),
        ("train.optimizer", "mine:optax", "mine defines no function optax"),
        ("train.optimizer", "subprocess:Popen", "subprocess defines no function Popen"),
        ("train.optimizer", "os:system", "os defines no function system"),
        ("train.optimizer", "mine:nothing", "gives no optax transformation"),
        ("model.name", "no_such_module:function", "no_such_module cannot be imported"),
    ],
)
def test_what_names_nothing_is_refused(own, key, value, words):
    config = configuration.base()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as told:
        rules.check(config)
        makers.make_network(config, digits())
        makers.make_optimizer(config, 10)
    assert key in str(told.value) and words in str(told.value) and "\n" not in str(told.value)


def test_a_network_of_the_command_line_trains_and_is_evaluated(own):
    from mpisjax.training.run import evaluate_at, restore_best, run, saved_config

    config = configuration.base()
    config.data.num_validation, config.train.epochs, config.train.batch_size = 180, 1, 256
    config.model.name, config.forward.mode = "mine:network", "rates"
    config.train.learning_rate, config.train.optimizer = 0.01, "adamw"
    result = run(config, own / "run")
    with pytest.raises(UserError, match=r"names 'mine:network' as its model.name, .* if you trust it, add --trust"):
        saved_config(own / "run")
    saved = saved_config(own / "run", ["mine:network"])
    assert saved.model.name == "mine:network"
    parts, state, _ = restore_best(own / "run", saved)
    assert evaluate_at(saved, parts, state, parts.dataset.test, None).accuracy == result.test["accuracy"]
    trusted = mpisjax.load(own / "run", trust=True)
    trusted.save(own / "saved")
    for path in (own / "run", own / "saved"):
        with pytest.raises(UserError, match="if you trust it, add --trust"):
            mpisjax.load(path)
    given = mpisjax.load(own / "saved", network=Linen())  # nothing is imported then
    images = parts.dataset.test.images[:20]
    assert np.array_equal(given.predict(images).labels, trusted.predict(images).labels)


def test_weights_to_start_from_import_nothing(own):
    """What the other run names is not looked at: its arrays alone are read, and have to fit."""
    from mpisjax.training.run import run

    config = configuration.base()
    config.data.num_validation, config.train.epochs, config.train.batch_size = 180, 1, 600
    config.model.name, config.forward.mode, config.train.optimizer = "mine:network", "rates", "mine:adam"
    run(config, own / "first")
    (own / "mine.py").rename(own / "yours.py")
    config.model.name, config.train.optimizer, config.train.init_from = "yours:network", "sgd", str(own / "first")
    assert run(config, own / "second").step == 2


def started(**settings):
    """A step of the linen network with plain SGD, its state, and a batch."""
    network, dataset, neuron = as_module(Linen(normalised=False)), digits(), mpisjax.LIF()
    optimizer = optax.sgd(0.5)
    variables = initial_variables(network, 0, (8, 8, 1), neuron)
    how = {
        "inputs": dataset,
        "neuron": neuron,
        "forward": mpisjax.RateForward(max_steps=20, tol=1e-5),
        **settings,
    }
    taken = step.make_train_step(network, optimizer, **how)
    return network, taken, init_state(variables, optimizer), Feed(dataset.train, 64, 0).batch(0)


def rates_of(network, state, batch):
    """The mean rate of the hidden layer."""
    x = prepare_images(batch.images, digits())
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out = model.apply(network, variables, x, neuron=mpisjax.LIF(), forward=mpisjax.RateForward())
    return float(out.equilibrium.rates["only"].mean())


def test_the_rate_penalty_lowers_the_rates_and_costs_nothing_by_default(monkeypatch):
    found = {}
    for weight in (0.0, 5.0):
        network, taken, state, batch = started(rate_weight=weight)
        before, first = rates_of(network, state, batch), None
        for _ in range(3):
            state, metrics = taken(state, batch)
            first = float(metrics.loss) if first is None else first
        found[weight] = first, before, rates_of(network, state, batch)
    assert found[5.0][0] == pytest.approx(found[0.0][0] + 5.0 * found[0.0][1], rel=1e-3)  # the loss says so
    assert found[5.0][2] < 0.8 * found[0.0][2]
    monkeypatch.setattr(loss, "mean_rate", lambda activity: pytest.fail("computed"))
    _, taken, state, batch = started()
    taken(state, batch)


def test_the_loss_weighs_classes():
    _, taken, state, batch = started()
    plain = float(taken(state, batch)[1].loss)
    doubled = [2.0] * 10
    _, taken, state, batch = started(class_weights=doubled)
    assert float(taken(state, batch)[1].loss) == pytest.approx(2 * plain, rel=1e-6)
    only = [0.0] * 10
    only[3] = 1.0
    _, taken, state, batch = started(class_weights=only)
    one = float(taken(state, batch)[1].loss)
    rest = [1.0] * 10
    rest[3] = 0.0
    _, taken, state, batch = started(class_weights=rest)
    assert one + float(taken(state, batch)[1].loss) == pytest.approx(plain, rel=1e-5) and one > 0


def test_balanced_weights_are_inverse_shares():
    dataset = digits()
    weights = loss.class_weights_of("balanced", dataset)
    counts = np.bincount(dataset.train.labels)
    assert np.allclose(np.array(weights) * counts, len(dataset.train.labels) / 10)
    assert loss.class_weights_of("1,2,3,4,5,6,7,8,9,10", dataset) == tuple(float(n) for n in range(1, 11))


def test_the_learning_rate_is_read_where_the_optimizer_keeps_it():
    kept = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    weights = {"w": jnp.ones(2)}
    assert float(step.learning_rate_of(kept.init(weights))) == 0.25
    assert np.isnan(step.learning_rate_of(optax.adam(1e-3).init(weights)))
