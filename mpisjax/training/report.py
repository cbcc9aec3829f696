"""An evaluation as tables for the eye and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def as_json(score: Any) -> dict[str, Any]:
    """An evaluation as plain numbers; null for one that is not finite.

    Args:
        score: A NamedTuple of numbers and of dicts of numbers (`mpisjax.training.evaluation.Evaluation`).
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, int):
            return value
        return float(value) if value is not None and math.isfinite(value) else None

    return plain(score._asdict())


def readout_name(bptt: Any) -> str:
    """Which way to the answer `accuracy` stands for: a network trained through time has a readout of its own.

    Args:
        bptt: How it was trained through time (`mpisjax.baselines.bptt.BPTT`); None: by its equilibrium.
    """
    if bptt is None:
        return "equivalent path"
    seen = "firing rates" if bptt.readout == "rate" else "mean membrane potentials"
    return f"readout it was trained with, {seen}"


def show(console: Console, title: str, result: Mapping[str, Any], readout: str = "equivalent path") -> None:
    """Prints one evaluation: accuracy and loss, the residual of each stream, the firing rate of each layer.

    Args:
        console: Where to.
        title: What was evaluated.
        result: What `as_json` gave.
        readout: What `accuracy` and `loss` are by; see `readout_name`.
    """
    console.print(title, style="italic", highlight=False, markup=False)
    main = Table(show_header=False)
    main.add_column("", style="bold")
    main.add_column("", justify="right")
    main.add_row(f"accuracy, {readout}", percent(result["accuracy"]))
    if result["accuracy_spikes"] is not None:
        main.add_row(
            f"accuracy, spikes alone, T = {result['num_steps']:g}", percent(result["accuracy_spikes"])
        )
    main.add_row(f"loss, {readout}", number(result["loss"]))
    if result["synops"] is not None:
        main.add_row("synaptic operations a sample", f"{result['synops']:,.0f}")
    for stream, residual in result["residual"].items():
        main.add_row(f"residual, {stream}", number(residual))
    console.print(main)
    rates = Table()
    rates.add_column("layer", style="bold")
    rates.add_column("mean firing rate (spikes per neuron and time step)", justify="right")
    for layer, rate in result["firing_rates"].items():
        rates.add_row(layer, number(rate))
    console.print(rates)


def show_steps(
    console: Console, results: Sequence[Mapping[str, Any]], readout: str = "equivalent path"
) -> None:
    """Prints accuracy, residual, firing rate and synaptic operations against the number of time steps T.

    Args:
        console: Where to.
        results: What `as_json` gave, one for each T.
        readout: What `accuracy` is by; see `readout_name`.
    """
    table = Table()
    for name in (
        "T",
        readout,
        "spikes alone",
        "largest residual",
        "firing rate, mean of layers",
        "SynOps a sample",
    ):
        table.add_column(name, justify="right")
    for result in results:
        residuals = [value for value in result["residual"].values() if value is not None]
        rates = [value for value in result["firing_rates"].values() if value is not None]
        table.add_row(
            f"{result['num_steps']:g}",
            percent(result["accuracy"]),
            percent(result["accuracy_spikes"]),
            number(max(residuals)) if residuals else "-",
            number(sum(rates) / len(rates)) if rates else "-",
            f"{result['synops']:,.0f}" if result["synops"] is not None else "-",
        )
    console.print(table)


def percent(share: float | None) -> str:
    """A share in per cent."""
    return "not finite" if share is None else f"{100 * share:.2f}%"


def number(value: float | None) -> str:
    """A number with four digits."""
    return "not finite" if value is None else f"{value:.4g}"
