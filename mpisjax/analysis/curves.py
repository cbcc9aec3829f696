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

CURVES_NAME = "curves.png"
NAMES = ("loss", "accuracy", "learning_rate", "residuals", "solver_steps", "gradient_norm")
# Batches are augmented and their labels may be smoothed: their loss may lie above that of validation.
KINDS = {"train": "training batches, as trained on", "validation": "validation", "test": "test, of the best state"}
Rows = list[dict[str, Any]]


def draw_curves(workdir: Path, title: str) -> None:
    """Draws the `metrics.jsonl` of the run in `workdir` into `curves.png` there (`on_end` of `fit`)."""
    rows = read_rows(workdir / FILE_NAME)
    steps_per_epoch = next((round(row["step"] / row["epoch"]) for row in rows if row.get("epoch")), 1)
    save_curves(rows, workdir / CURVES_NAME, title, steps_per_epoch)


def save_curves(rows: Rows, path: Path, title: str, steps_per_epoch: int) -> None:
    """Writes `training_curves` as a PNG, whole or not at all."""
    write_atomically(path, as_png(training_curves(rows, title, steps_per_epoch)))


def training_curves(rows: Rows, title: str, steps_per_epoch: int) -> Figure:
    """Draws loss, accuracy, residuals, solver steps and learning rate against epochs, six panels in one figure.

    Args:
        rows: Rows of `metrics.jsonl`.
        title: What stands above the panels.
        steps_per_epoch: Training steps in an epoch.
    """
    figure = new_figure(12.0, 7.0)
    figure.suptitle(title)
    _draw_all(rows, steps_per_epoch, dict(zip(NAMES, figure.subplots(2, 3).ravel(), strict=True)))
    return figure


def training_figures(rows: Rows, steps_per_epoch: int) -> dict[str, Figure]:
    """The panels of `training_curves` as a figure each, by name."""
    drawn = {name: panel("", "", "") for name in NAMES}
    _draw_all(rows, steps_per_epoch, {name: axis for name, (_, axis) in drawn.items()})
    return {name: figure for name, (figure, axis) in drawn.items() if axis.lines}


def _draw_all(rows: Rows, steps_per_epoch: int, axes: Mapping[str, Axes]) -> None:
    panels = _Panels(rows, steps_per_epoch)
    kinds = [("train", TRAIN), ("validation", VALIDATION), ("test", TEST)]
    panels.draw(axes["loss"], "Loss", "cross-entropy", [(kind, "loss", color) for kind, color in kinds[:2]])
    panels.draw(axes["accuracy"], "Accuracy", "% correct", [(k, "accuracy", c) for k, c in kinds], scale=100.0)
    panels.draw(axes["learning_rate"], "Learning rate", "learning rate", [("train", "learning_rate", TRAIN)])
    residuals = [("train", "forward_residual", TRAIN), ("train", "adjoint_residual", VALIDATION)]
    title = "Residual of the fixed point and of its adjoint"
    panels.draw(axes["residuals"], title, "relative residual", residuals, log=True)
    solves = [("train", "forward_steps", TRAIN), ("train", "adjoint_steps", VALIDATION)]
    panels.draw(axes["solver_steps"], "Solver steps", "steps", solves)
    panels.draw(axes["gradient_norm"], "Gradient norm", "norm", [("train", "grad_norm", TRAIN)], log=True)


class _Panels:
    """Draws chosen rows against epochs."""

    def __init__(self, rows: Rows, steps_per_epoch: int) -> None:
        self._rows, self._steps_per_epoch = rows, steps_per_epoch

    def draw(
        self,
        axis: Any,
        title: str,
        unit: str,
        curves: list[tuple[str, str, str]],
        scale: float = 1.0,
        log: bool = False,
    ) -> None:
        labelled = 0
        for kind, key, color in curves:
            points = [
                ((row.get("checkpoint_step") or row["step"]) / self._steps_per_epoch, row[key] * scale)
                for row in self._rows
                if row["kind"] == kind and row.get(key) is not None and (not log or row[key] > 0)
            ]
            if not points:
                continue
            label = KINDS[kind] if key in ("loss", "accuracy") else key.split("_")[0] if len(curves) > 1 else None
            few = len(points) <= 40
            marker = "*" if kind == "test" else "o" if few else None
            axis.plot(
                *zip(*points, strict=True),
                color=color,
                label=label,
                marker=marker,
                markersize=9 if kind == "test" else 3,
                linewidth=1.4,
                linestyle="none" if kind == "test" else "-",
                zorder=3 if kind == "test" else 2,
            )
            labelled += label is not None
        tidy(axis, title, "epoch", unit)
        axis.set_xlim(left=0)
        if log and axis.lines:
            axis.set_yscale("log")
        if labelled > 1:
            axis.legend(frameon=False, fontsize=9)
