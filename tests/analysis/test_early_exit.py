"""Anytime answers: those of separate simulations, where they stop, and the threshold that held-out examples choose."""

import jax
import numpy as np
import pytest

import mpisjax
from mpisjax import nn
from mpisjax.analysis import anytime
from mpisjax.configuration import makers
from mpisjax.data import prepare_images
from mpisjax.nn import operations

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def digits():
    trained = mpisjax.load_pretrained("digits")
    return trained, makers.make_dataset(trained.config)


def test_answers_over_time_are_those_of_separate_simulations(digits):
    trained, dataset = digits
    x = prepare_images(jax.numpy.asarray(dataset.test.images[:4]), dataset)
    ask = jax.jit(lambda v, x: anytime.answers_over_time(trained.net, v, x, neuron=trained.neuron, num_steps=6))
    found = ask(trained.variables, x)
    counted = operations.count_operations(trained.net, trained.variables, x, trained.neuron)
    for steps in (1, 3, 6):
        forward = mpisjax.SpikeForward(steps)
        one = nn.spikes(trained.net, trained.variables, x, neuron=trained.neuron, forward=forward)
        logits = nn.model.classify(trained.net, trained.variables, one.rates)
        np.testing.assert_allclose(found.logits[steps - 1], logits, atol=0.05)
        spikes = sum(np.asarray(c).sum((1, 2, 3)) for c in one.spike_counts.values())
        np.testing.assert_allclose(found.spikes[steps - 1], spikes, atol=4)
        events = sum(counted.synops(one.spike_counts).values())
        np.testing.assert_allclose(found.synops[steps - 1], events, rtol=2e-3)


def test_the_first_sure_answer():
    confidence = np.array([[0.2, 0.9, 0.5], [0.6, 0.1, 0.5], [0.7, 0.95, 0.5]])
    assert anytime.first_sure(confidence, 0.6).tolist() == [1, 0, 2]
    assert anytime.first_sure(confidence, 1.1).tolist() == [2, 2, 2]
    assert anytime.first_sure(confidence, 0.0).tolist() == [0, 0, 0]


def made_up(correct):
    steps = len(correct)
    confidence = np.array([[0.3, 0.6], [0.7, 0.95], [0.99, 0.99]])[:steps]
    return anytime.Record(confidence, np.array(correct), np.array([[1.0, 3.0], [2.0, 6.0], [4.0, 9.0]])[:steps])


def test_early_exits_are_counted():
    found = anytime.early_exit(made_up([[False, True], [True, True], [True, False]]), 0.6)
    assert found.mean_steps == 1.5 and found.accuracy == 1.0 and found.synops == 2.5
    assert (found.max_steps, found.full_accuracy, found.full_synops) == (3, 0.5, 6.5)


def test_the_threshold_keeps_the_accuracy_and_saves_the_most():
    sure_at_once = anytime.choose_threshold(made_up([[True, True]] * 3))
    assert sure_at_once <= 0.3
    needs_two = anytime.choose_threshold(made_up([[False, True], [True, True], [True, True]]))
    assert 0.3 < needs_two <= 0.7
    needs_all = anytime.choose_threshold(made_up([[False, False], [False, False], [True, True]]))
    assert 0.95 < needs_all <= 0.99
    unsure = made_up([[False, False], [True, True]])._replace(confidence=np.array([[1.0, 1.0], [1.0, 1.0]]))
    assert anytime.choose_threshold(unsure) > 1  # no confidence tells right from wrong: take every step


def test_a_trained_network_saves_half_of_its_operations(digits):
    trained, dataset = digits
    asked = {"neuron": trained.neuron, "num_steps": trained.config.forward.num_steps}
    held_out, test = (
        anytime.record(trained.net, trained.variables, trained.inputs, split, batch_size=128, **asked)
        for split in (dataset.validation, dataset.test)
    )
    assert held_out.correct.shape == (16, 180) and test.confidence.shape == (16, 360)
    found = anytime.early_exit(test, anytime.choose_threshold(held_out))
    assert found.accuracy >= found.full_accuracy - 0.01
    assert found.synops < found.full_synops / 2 and found.mean_steps < 8
    assert found.full_accuracy == pytest.approx(trained.card["test"]["accuracy_spikes"], abs=2.5 / 360)
    assert found.full_synops == pytest.approx(trained.card["test"]["synops"], rel=5e-3)
