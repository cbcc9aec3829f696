"""Validation accuracy and training time against the tolerance of the solvers."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, across_seeds, mean, of_seeds, table

TITLE = "Solver tolerance: accuracy and time"


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return list(scale.tolerances)


def run(study: Study) -> dict[str, Any]:
    """Trains at every tolerance; gives the rows. The test split is not read."""
    shown = [
        {
            **described(net),
            "tol": net.settings["forward.tol"],
            "most": " + ".join(str(net.settings[f"{side}.max_steps"]) for side in ("forward", "adjoint")),
        }
        for net in nets(study.scale)
    ]
    rows = study.rows("tolerance", nets=shown)
    for net in nets(study.scale):
        for seed in study.scale.seeds:
            settings = study.settings(net, seed)
            rows.row(f"{net.name} seed {seed}", settings, partial(measure, study, net, seed))
    return rows.finish()


def measure(study: Study, net: Net, seed: int) -> dict[str, Any]:
    """Trains one network; gives means over its second half of training and the best validation accuracy."""
    result = study.finished(net, seed)
    lines = [json.loads(line) for line in (study.workdir(net, seed) / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in lines if row["kind"] == "train"]
    late = train[len(train) // 2 :]
    names = ("forward_steps", "forward_residual", "adjoint_steps", "adjoint_residual")
    found: dict[str, Any] = {name: mean([row[name] for row in late]) for name in names}
    validation = [row for row in lines if row["kind"] == "validation"]
    found |= {"accuracy": result.best_accuracy, "accuracy_spikes": validation[-1]["accuracy_spikes"]}
    if study.timing:
        speed = sorted(row["images_per_second"] for row in late)
        found["seconds_per_epoch"] = net.examples / speed[len(speed) // 2]
    return {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}


def render(content: dict[str, Any]) -> str:
    """A row a tolerance."""
    lines = []
    for net in content["nets"]:
        runs = of_seeds(content, net["name"])

        def column(name: str, digits: int, factor: float = 1.0, runs: Any = runs) -> str:
            if any(name not in r for r in runs):
                return MISSING
            return across_seeds([r[name] for r in runs], digits, factor)

        lines.append(
            [
                f"{net['tol']:g}",
                str(net["most"]),  # a number in results of before 2026-11-26
                column("accuracy", 2, 100),
                column("accuracy_spikes", 2, 100),
                column("forward_steps", 1),
                column("forward_residual", 3),
                column("adjoint_steps", 1),
                column("adjoint_residual", 3),
                column("seconds_per_epoch", 0),
            ]
        )
    header = [
        "tolerance",
        "at most, steps",
        "validation, %",
        "spikes alone, %",
        "forward steps",
        "residual",
        "adjoint steps",
        "adjoint residual",
        "seconds an epoch",
    ]
    about = (
        "Training in rate mode. The forward solver and the adjoint have the same tolerance, and limits of their own. "
        "Steps and residuals are means over the second half of training. The solver's residual is that of the iterate "
        "before the one that is used."
    )
    return f"{table(header, lines, 0)}\n\n{about}"


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and time of an epoch against the tolerance."""
    from mpisjax.analysis.figures import COLORS, panel

    points = [
        (net["tol"], net["most"], of_seeds(content, net["name"]))
        for net in content["nets"]
        if of_seeds(content, net["name"])
    ]
    if not points:
        return {}
    shown = {"accuracy": (100, "% correct, validation")}
    if all("seconds_per_epoch" in r for _, _, runs in points for r in runs):
        shown["seconds_per_epoch"] = (1, "seconds an epoch")
    limits = list(dict.fromkeys(most for _, most, _ in points))
    tolerances = sorted({t for t, _, _ in points})
    figures = {}
    for name, (factor, label) in shown.items():
        figures[name], axis = panel("", "relative tolerance of both solvers", label)
        for color, limit in zip(COLORS, limits, strict=False):
            chosen = sorted((t, factor * mean([r[name] for r in runs])) for t, m, runs in points if m == limit)
            axis.plot(*zip(*chosen, strict=True), "o-", color=color, label=f"at most {limit} steps")
        if name == "accuracy":  # what lies within a standard error looks small
            low, high = axis.get_ylim()
            axis.set_ylim(low - 1, high + 1)
        axis.set_xscale("log")
        axis.set_xticks(tolerances, [f"{t:g}" for t in tolerances])
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.legend(frameon=False, fontsize=8)
    return figures
