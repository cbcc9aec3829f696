"""The curves of a run, from the rows of its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpisjax.analysis.figures import TEST, TRAIN, VALIDATION, as_png, new_figure, panel, tidy
from mpisjax.storage.run_folder import write_atomically
from mpisjax.training.metrics import FILE_NAME, read_rows

NAMES = ("loss", "accuracy", "learning_rate", "residuals", "solver_steps", "gradient_norm")
# Batches are augmented and their labels may be smoothed: their loss may lie above that of validation.
KINDS = {"train": "training batches, as trained on", "validation": "validation", "test": "test, of the best state"}
Rows = list[dict[str, Any]]


def draw_curves(workdir: Path, title: str) -> None:
    """Draws the `metrics.jsonl` of a run against epochs, six panels in `curves.png` beside it (`on_end` of `fit`).

    Args:
        workdir: The run's folder.
        title: What stands above the panels.
    """
    figure = new_figure(12.0, 7.0)
    figure.suptitle(title)
    _draw_all(read_rows(workdir / FILE_NAME), dict(zip(NAMES, figure.subplots(2, 3).ravel(), strict=True)))
    write_atomically(workdir / "curves.png", as_png(figure))


def training_figures(rows: Rows) -> dict[str, Figure]:
    """The panels of `draw_curves` as a figure each, by name; those without a curve are left out."""
    drawn = {name: panel("", "", "") for name in NAMES}
    _draw_all(rows, {name: axis for name, (_, axis) in drawn.items()})
    return {name: figure for name, (figure, axis) in drawn.items() if axis.lines}


def _draw_all(rows: Rows, axes: Mapping[str, Axes]) -> None:
    steps_per_epoch = next((round(row["step"] / row["epoch"]) for row in rows if row.get("epoch")), 1)

    def draw(
        name: str, title: str, unit: str, curves: Mapping[tuple[str, str], str], scale: float = 1.0, log: bool = False
    ) -> None:
        """One panel, from the color of each kind of row and key in it."""
        axis = axes[name]
        for (kind, key), color in curves.items():
            points = [
                ((row.get("checkpoint_step") or row["step"]) / steps_per_epoch, row[key] * scale)
                for row in rows
                if row["kind"] == kind and row.get(key) is not None and (not log or row[key] > 0)
            ]
            if not points:
                continue
            label = KINDS[kind] if key in ("loss", "accuracy") else key.split("_")[0] if len(curves) > 1 else None
            look: dict[str, Any] = {"marker": "o" if len(points) <= 40 else None, "markersize": 3}
            if kind == "test":
                look = {"marker": "*", "markersize": 9, "linestyle": "none", "zorder": 3}
            axis.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.4, **look)
        tidy(axis, title, "epoch", unit)
        axis.set_xlim(left=0)
        if log and axis.lines:
            axis.set_yscale("log")
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(frameon=False, fontsize=9)

    train, validation, test = ("train", TRAIN), ("validation", VALIDATION), ("test", TEST)
    draw("loss", "Loss", "cross-entropy", {(kind, "loss"): color for kind, color in (train, validation)})
    draw(
        "accuracy",
        "Accuracy",
        "% correct",
        {(kind, "accuracy"): color for kind, color in (train, validation, test)},
        100.0,
    )
    draw("learning_rate", "Learning rate", "learning rate", {("train", "learning_rate"): TRAIN})
    solves = {
        what: {("train", f"forward_{what}"): TRAIN, ("train", f"adjoint_{what}"): VALIDATION}
        for what in ("residual", "steps")
    }
    title = "Residual of the fixed point and of its adjoint"
    draw("residuals", title, "relative residual", solves["residual"], log=True)
    draw("solver_steps", "Solver steps", "steps", solves["steps"])
    draw("gradient_norm", "Gradient norm", "norm", {("train", "grad_norm"): TRAIN}, log=True)
