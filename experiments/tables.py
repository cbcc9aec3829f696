"""Rows as Markdown, figures as PNG and SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MISSING = "not run here"
FEWEST_SEEDS = 3


def table(header: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 1) -> str:
    """A Markdown table, with numbers aligned to the right from column `first_number` on."""
    rule = ["---" if i < first_number else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def across_seeds(values: Sequence[float | None], digits: int = 2, factor: float = 1.0) -> str:
    """One value, or mean and standard deviation of several; says if one is missing or not finite."""
    if not values:
        return MISSING
    finite = [factor * v for v in values if v is not None]
    if len(finite) < len(values):
        return "not finite"
    if len(finite) == 1:
        return f"{finite[0]:.{digits}f}"
    return f"{statistics.mean(finite):.{digits}f} ± {statistics.stdev(finite):.{digits}f}"


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return statistics.fmean(values)


def verdict(
    content: dict[str, Any], where: str, names: tuple[str, str], equal: str, seeds: Sequence[Sequence[float]]
) -> str:
    """A sentence that says which of two networks is more accurate, if the seeds show it.

    A difference is shown where it is more than two of its standard errors, with three seeds of each at least.

    Args:
        content: The experiment's; its smoke scale trains too little for a verdict and gets none.
        where: The data.
        names: Of both networks.
        equal: What they have in common.
        seeds: Of both, the accuracies (between 0 and 1) of every seed.
    """
    if content["scale"] == "smoke":
        return ""
    ours, other = names
    if min(map(len, seeds)) < FEWEST_SEEDS:
        return f"{where}: {ours} and {other} are not compared, because that takes {FEWEST_SEEDS} seeds of each."
    a, b = ([100 * value for value in found] for found in seeds)
    difference = mean(a) - mean(b)
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    figures = f"{difference:+.2f} points, standard error {error:.2f}"
    if abs(difference) <= 2 * error:
        return f"{where}: no difference shown between {ours} and {other} at equal {equal} ({figures})."
    word = "beats" if difference > 0 else "does not beat"
    return f"{where}: {ours} {word} {other} at equal {equal} ({figures})."


def of_seeds(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The results of a network for every seed that was run."""
    keys = [f"{name} seed {seed}" for seed in content["seeds"]]
    return [content["rows"][k]["result"] for k in keys if k in content["rows"]]


def provenance(content: dict[str, Any]) -> str:
    """A sentence with the scale, epochs, seeds, dates and machines of the finished rows."""
    rows = list(content["rows"].values())
    if not rows:
        return "Nothing has been run."
    machines = dict.fromkeys(
        f"{m['processor']} ({m['cores']} cores, {m['devices']}), JAX {m['jax']}, Python {m['python']}"
        for m in (row["machine"] for row in rows)
    )
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    seeds = content["seeds"]
    number = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    nets = [net for pair in content.get("pairs", []) for net in pair] + content.get("nets", [])
    epochs = " or ".join(map(str, sorted({net["epochs"] for net in nets})))
    trained = f"epochs: {epochs}" if nets else "nothing trained"
    return f"Scale `{content['scale']}`, {trained}, {number}, {when}, {'; '.join(machines)}."


def save_figures(figures: dict[str, Any], folder: Path) -> None:
    """Writes every figure as PNG and SVG; the same figure gives the same bytes."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpisjax"}):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
