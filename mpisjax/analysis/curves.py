"""The curves of a run as one PNG, from the rows of `metrics.jsonl`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mpisjax.training.atomic import write_atomically
from mpisjax.training.metrics import FILE_NAME, read_rows

CURVES_NAME = "curves.png"
Rows = list[dict[str, Any]]
TRAIN, VALIDATION, TEST = "#2a6fbb", "#d1495b", "#3a3a3a"
GRID = {"color": "#e3e3e3", "linewidth": 0.8}


def draw_curves(workdir: Path, title: str) -> None:
    """Draws the curves of the run whose rows lie in `workdir`, into `curves.png` there; for `fit`'s `on_end`."""
    rows = read_rows(workdir / FILE_NAME)
    steps_per_epoch = next((round(row["step"] / row["epoch"]) for row in rows if row.get("epoch")), 1)
    save_curves(rows, workdir / CURVES_NAME, title, steps_per_epoch)


def save_curves(rows: Rows, path: Path, title: str, steps_per_epoch: int) -> None:
    """Draws loss, accuracy, residuals, solver steps and learning rate against epochs.

    Args:
        rows: Rows of `metrics.jsonl`.
        path: The PNG to write, whole or not at all.
        title: What stands above the panels.
        steps_per_epoch: Training steps in an epoch.
    """
    # Not pyplot: it keeps global state and may look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 7.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    figure.suptitle(title)
    curves = _Curves(rows, steps_per_epoch)

    curves.draw(
        axes[0], "Loss", "cross-entropy", [("train", "loss", TRAIN), ("validation", "loss", VALIDATION)]
    )
    kinds = [("train", "accuracy", TRAIN), ("validation", "accuracy", VALIDATION), ("test", "accuracy", TEST)]
    curves.draw(axes[1], "Accuracy", "% correct", kinds, scale=100.0)
    curves.draw(axes[2], "Learning rate", "learning rate", [("train", "learning_rate", TRAIN)])
    residuals = [("train", "forward_residual", TRAIN), ("train", "adjoint_residual", VALIDATION)]
    curves.draw(
        axes[3], "Residual of the fixed point and of its adjoint", "relative residual", residuals, log=True
    )
    solves = [("train", "forward_steps", TRAIN), ("train", "adjoint_steps", VALIDATION)]
    curves.draw(axes[4], "Solver steps", "steps", solves)
    curves.draw(axes[5], "Gradient norm", "norm", [("train", "grad_norm", TRAIN)], log=True)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


class _Curves:
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
                (row["step"] / self._steps_per_epoch, row[key] * scale)
                for row in self._rows
                if row["kind"] == kind and row.get(key) is not None and (not log or row[key] > 0)
            ]
            if not points:
                continue
            label = kind if key in ("loss", "accuracy") else key.split("_")[0] if len(curves) > 1 else None
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
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.set_xlim(left=0)
        if log and axis.lines:
            axis.set_yscale("log")
        axis.grid(**GRID)
        axis.spines[["top", "right"]].set_visible(False)
        if labelled > 1:
            axis.legend(frameon=False, fontsize=9)
