"""A run that ends at chance says so, with a likely cause; a healthy one does not."""

from __future__ import annotations

import math

import optax
import pytest
from test_fit import Linen, Pure, digits, fit

from mpisjax.training.chance import explain

pytestmark = pytest.mark.unoptimized
EVEN = {"validation": [50] * 10, "test": [100] * 10}


def rows(accuracy: float, loss: float | None, *, kind="test", seen=0.1, step=500, number=None, **figures):
    """A run of one epoch's rows and a measurement."""
    row = {"kind": "train", "step": step, "epoch": 1.0, "loss": 2.3, "accuracy": seen, "learning_rate": 0.1}
    row |= {"skipped_steps": 0.0, **figures.pop("trained", {})}
    layers = {"firing_rates": {"stream1/layer1": 0.2}, "residual": {"stream1": 0.1}, **figures}
    number = number or sum(EVEN[kind])
    return [row, {"kind": kind, "step": step, "accuracy": accuracy, "loss": loss, "num_examples": number, **layers}]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            {"trained": {"loss": 40.0}},
            "the learning rate (0.1 at most) is too high (train.learning_rate): the loss rose to 40",
        ),
        ({"trained": {"skipped_steps": 3.0}}, "3 steps were not finite"),
        ({"trained": {"loss": None}}, "too high"),
        ({"firing_rates": {"a": 0.0, "b": 0.3}}, "a (0 spikes a neuron and step) is silent and passes no gradient"),
        ({"firing_rates": {"a": 0.999, "b": 1.0}}, "b (1 spikes a neuron and step) are saturated"),
        ({"residual": {"stream1": 0.9, "stream2": None}}, "a residual of 0.9 of stream1, inf of stream2"),
        ({"step": 19}, "19 steps are too few"),
        ({}, "the labels have nothing to do with the inputs"),
        ({"seen": 0.9}, "90.0% of the training examples are right: it does not generalise"),
    ],
)
def test_the_cause_is_read_from_the_figures(figures, words):
    said = explain(rows(0.1, 2.31, **figures), EVEN)
    assert said and said.startswith("this run has ended at chance: 10.0% of the test split is right") and words in said


def test_what_has_learned_something_is_left_alone():
    assert explain(rows(0.2, 2.31), EVEN) is None  # of 1,000 examples
    assert explain(rows(0.1, 1.9), EVEN) is None
    assert explain(rows(0.1, None), EVEN)  # a loss that is no number
    uneven = {"test": [950, 50]}  # hardly more right than the frequent class alone, and yet it knows more
    assert explain(rows(0.951, 0.1), uneven) is None
    assert "gives 95.0%" in (explain(rows(0.95, 0.25), uneven) or "")
    few = {"validation": [3, 2, 2]}
    assert explain(rows(3 / 7, 1.2, kind="validation", seen=0.9, number=7), few) is None
    assert explain(rows(3 / 7, 1.2, kind="validation", seen=0.4, number=7), few)
    assert explain([], {}) is None and explain(rows(0.1, 2.3)[:1], EVEN) is None


def test_no_loss_is_lower_than_that_of_a_guess():
    assert explain(rows(0.1, math.log(10) * 0.94), EVEN) is None


def test_what_was_learned_and_lost_is_said():
    good, bad = rows(0.4, 1.8, kind="validation"), rows(0.1, 2.31, kind="validation", step=600)
    said = explain([*good, *bad], EVEN)
    assert said and "40.0% were right after step 500, and that was lost again" in said
    best_state = rows(0.4, 1.8)[1]  # is tested, and is not where the run has ended
    assert explain([*good, *bad, best_state], EVEN) == said
    assert explain([*good, best_state], EVEN) is None


class Silent(Pure):
    """Its neurons get too little to fire."""

    def encode(self, variables, images, train):
        current, batch_stats = super().encode(variables, images, train)
        return current - 100.0, batch_stats


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        (Linen(), {"optimizer": optax.sgd(1e5)}, "is too high (train.learning_rate): the loss rose to"),
        (Silent(), {}, "hidden (0 spikes a neuron and step) is silent"),
    ],
)
def test_a_run_says_it(tmp_path, log, network, settings, words):
    fit(tmp_path, network, epochs=7, **settings)
    assert "this run has ended at chance" in log.text and words in log.text


def test_a_healthy_run_does_not(tmp_path, log):
    _, result = fit(tmp_path, Linen(), digits(), epochs=4)
    assert result.test["accuracy"] > 0.5 and "at chance" not in log.text
