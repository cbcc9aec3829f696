"""A run that has learned nothing says so at its end, and what its own figures give as the likely cause."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpisjax.data import DataSet, class_counts
from mpisjax.storage import processes, run_folder
from mpisjax.training.metrics import FILE_NAME, read_rows

FEW_STEPS = 50
FEW_EXAMPLES = 100  # of fewer an accuracy alone says little
SILENT, SATURATED = 1e-3, 0.98  # spikes a neuron and step, mean of a layer
LARGE_RESIDUAL = 0.5
Row = Mapping[str, Any]
_log = logging.getLogger(__name__)


def warn_at_chance(workdir: Path, dataset: DataSet) -> None:
    """Logs why a run that has ended has learned nothing, where that is so.

    Args:
        workdir: The run's folder.
        dataset: What it was trained on.
    """
    if processes.is_primary():
        counts = {
            name: class_counts(getattr(dataset, name).labels, dataset.num_classes) for name in ("validation", "test")
        }
        sentence = explain(read_rows(run_folder.local_of(workdir) / FILE_NAME), counts)
        if sentence:
            _log.warning("%s", sentence)


def explain(rows: Sequence[Row], counts: Mapping[str, Sequence[int]]) -> str | None:
    """Why a run has ended at chance: no better than the answer that is always the most frequent class.

    Accuracy and loss must both say so, and of few examples the training accuracy, too: a network that is wrong about a
    small or an uneven split has often learned something.

    Args:
        rows: Of `metrics.jsonl`.
        counts: Examples of each class by split.

    Returns:
        A sentence; None where the run has learned something, or nothing was measured.
    """
    trained = [row for row in rows if row["kind"] == "train"]
    validated = [row for row in rows if row["kind"] == "validation"]
    # The test split's row is of the best state, and comes last: the last epoch may be worse.
    ends = [row for row in (*rows[-1:], *validated[-1:]) if row["kind"] != "train" and _at_chance(row, counts)]
    if not ends or not trained:
        return None
    last = ends[0]
    guess = max(counts[last["kind"]]) / sum(counts[last["kind"]])
    last_epoch = [row for row in trained if row["epoch"] > trained[-1]["epoch"] - 1]
    seen = statistics.fmean(row["accuracy"] or 0.0 for row in last_epoch)
    learned = seen > guess + 0.1
    if learned and last["num_examples"] < FEW_EXAMPLES:
        return None
    said = (
        f"this run has ended at chance: {100 * (last['accuracy'] or 0.0):.1f}% of the {last['kind']} split is right, "
        f"and always naming its most frequent class gives {100 * guess:.1f}%"
    )
    network = _of_the_network(last)
    before = [row for row in validated if (row["accuracy"] or 0.0) > guess + 0.1 and not _at_chance(row, counts)]
    if learned:
        how = "it does not generalise, or its spikes are not its rates (more forward.num_steps)"
        causes = [*network, f"{100 * seen:.1f}% of the training examples are right: {how}"]
    else:
        best = max(before, key=lambda row: row["accuracy"], default=None)
        causes = [*_of_the_steps(trained, best, len(counts[last["kind"]])), *network]
    if not causes:
        causes = [
            f"layers and residual look sound, and the loss went from {trained[0]['loss']:.3g} to "
            f"{trained[-1]['loss']:.3g}: the learning rate{_highest(trained)} is too low or too high, or the labels "
            "have nothing to do with the inputs"
        ]
    return f"{said}. Likely cause: {'; '.join(causes)}"


def _at_chance(row: Row, counts: Mapping[str, Sequence[int]]) -> bool:
    """Whether a measurement is no better than the best guess, by accuracy and by loss."""
    shares = np.asarray(counts[row["kind"]], float)
    shares = shares[shares > 0] / shares.sum()
    guess, doubt = shares.max(), -(shares * np.log(shares)).sum()
    limit = guess + 2 * math.sqrt(guess * (1 - guess) / row["num_examples"])
    return (row["accuracy"] or 0.0) <= limit and (row["loss"] is None or row["loss"] >= 0.95 * doubt)


def _of_the_steps(trained: Sequence[Row], best: Row | None, classes: int) -> list[str]:
    """What the training's own rows say: too few steps, or a learning rate that is too high.

    Args:
        trained: The rows.
        best: The best validation, if one was better than chance.
        classes: How many there are.
    """
    steps, uniform = trained[-1]["step"], math.log(classes)
    losses = [math.inf if row["loss"] is None else row["loss"] for row in trained]
    skipped = sum(row["skipped_steps"] for row in trained)
    if skipped:
        why = f"{skipped:.0f} steps were not finite"
    elif max(losses) > 2 * uniform:
        why = f"the loss rose to {max(losses):.3g}, where a guess has {uniform:.3g}"
    elif best is not None:
        why = f"{100 * best['accuracy']:.1f}% were right after step {best['step']}, and that was lost again"
    else:
        return [f"{steps} steps are too few (train.epochs, train.batch_size)"] if steps < FEW_STEPS else []
    return [f"the learning rate{_highest(trained)} is too high (train.learning_rate): {why}"]


def _highest(trained: Sequence[Row]) -> str:
    """The highest learning rate, in brackets; nothing where nobody knows it."""
    rates = [row["learning_rate"] for row in trained if row["learning_rate"] is not None]
    return f" ({max(rates):.3g} at most)" if rates else ""


def _of_the_network(last: Row) -> list[str]:
    """What the spikes say: layers that are silent or saturated, whose gradient is 0, and rates that do not settle."""
    causes = []
    rates = {name: rate for name, rate in last["firing_rates"].items() if rate is not None}
    for what, found, advice in (
        ("silent", [name for name, rate in rates.items() if rate < SILENT], "lower"),
        ("saturated", [name for name, rate in rates.items() if rate > SATURATED], "raise"),
    ):
        if found:
            layers = ", ".join(f"{name} ({rates[name]:.2g} spikes a neuron and step)" for name in found)
            are = "is" if len(found) == 1 else "are"
            causes.append(f"{layers} {are} {what} and passes no gradient on ({advice} neuron.threshold)")
    residuals = {name: math.inf if value is None else value for name, value in last["residual"].items()}
    if large := [name for name, value in residuals.items() if value > LARGE_RESIDUAL]:
        streams = ", ".join(f"{residuals[name]:.2g} of {name}" for name in large)
        causes.append(
            f"the rates do not settle, with a residual of {streams} (more forward.num_steps, or train.jacobian_penalty)"
        )
    return causes
