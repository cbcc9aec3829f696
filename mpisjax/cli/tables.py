"""Measurements as tables for the eye."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mpisjax.analysis.anytime import EarlyExit
from mpisjax.analysis.classes import ByClass

MOST_CLASSES = 20  # that are shown one by one


def _print(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """A table, without a header where that is empty; the columns beside `left` are numbers."""
    table = Table(show_header=any(header))
    for n, name in enumerate(header):
        table.add_column(name, style="bold" if n == 0 and left else None, justify="left" if n in left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show(console: Console, title: str, result: Mapping[str, Any], readout: str) -> None:
    """Prints one evaluation: accuracy and loss, the residual of each stream, the firing rate of each layer.

    Args:
        console: Where to.
        title: What was evaluated.
        result: What `as_json` gave.
        readout: What `accuracy` and `loss` are by; see `readout_name`.
    """
    console.print(title, style="italic", highlight=False, markup=False)
    rows = [(f"accuracy, {readout}", percent(result["accuracy"]))]
    if result["accuracy_spikes"] is not None:
        rows.append((f"accuracy, spikes alone, T = {result['num_steps']:g}", percent(result["accuracy_spikes"])))
    rows.append((f"loss, {readout}", number(result["loss"])))
    if result["synops"] is not None:
        rows.append(("synaptic operations a sample", f"{result['synops']:,.0f}"))
    rows += [(f"residual, {stream}", number(residual)) for stream, residual in result["residual"].items()]
    _print(console, ("", ""), rows)
    rates = [(layer, number(rate)) for layer, rate in result["firing_rates"].items()]
    _print(console, ("layer", "mean firing rate (spikes per neuron and time step)"), rates)


def show_steps(console: Console, results: Sequence[Mapping[str, Any]], readout: str) -> None:
    """Prints accuracy, residual, firing rate and synaptic operations against the number of time steps T.

    Args:
        console: Where to.
        results: What `as_json` gave, one for each T.
        readout: What `accuracy` is by; see `readout_name`.
    """
    rows = []
    for result in results:
        residuals = [value for value in result["residual"].values() if value is not None]
        rates = [value for value in result["firing_rates"].values() if value is not None]
        rows.append((
            f"{result['num_steps']:g}",
            percent(result["accuracy"]),
            percent(result["accuracy_spikes"]),
            number(max(residuals)) if residuals else "-",
            number(sum(rates) / len(rates)) if rates else "-",
            f"{result['synops']:,.0f}" if result["synops"] is not None else "-",
        ))  # fmt: skip
    header = ("T", readout, "spikes alone", "largest residual", "firing rate, mean of layers", "SynOps a sample")
    _print(console, header, rows, left=())


def percent(share: float | None) -> str:
    """A share in per cent."""
    return "not finite" if share is None else f"{100 * share:.2f}%"


def number(value: float | None) -> str:
    """A number with four digits."""
    return "not finite" if value is None else f"{value:.4g}"


def show_classes(console: Console, found: ByClass) -> None:
    """Prints a row a class; nothing where there are many."""
    if len(found.figures) > MOST_CLASSES:
        return
    share = lambda value: "-" if value is None else percent(value)  # noqa: E731
    rows = [(c.name, f"{c.examples:,}", share(c.recall), share(c.precision), c.mistaken_for) for c in found.figures]
    _print(console, ("class", "examples", "right", "precision", "most often taken for"), rows, left=(0, 4))


def show_early_exit(console: Console, found: EarlyExit, held_out: int) -> None:
    """Prints what it gives to stop at the first sure answer.

    Args:
        console: Where to.
        found: What the threshold gives on the split that is measured.
        held_out: How many examples the threshold was chosen on.
    """
    if found.threshold > 1:
        console.print(
            f"No answer before the last step is as good as the last one, on {held_out:,} validation examples.",
            highlight=False,
        )
        return
    console.print(
        f"early exit at a confidence of {found.threshold:.2f}, chosen on {held_out:,} validation examples",
        style="italic",
        highlight=False,
    )
    rows = [
        ("accuracy, spikes alone", percent(found.full_accuracy), percent(found.accuracy)),
        ("time steps, mean", f"{found.max_steps}", f"{found.mean_steps:.2f}"),
    ]
    if found.full_synops:  # not of a network of one's own, whose synapses are not known
        rows.append(("synaptic operations a sample", f"{found.full_synops:,.0f}", f"{found.synops:,.0f}"))
    _print(console, ("", "all steps", "early exit"), rows)
