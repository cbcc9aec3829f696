"""The drawings of a report, as matplotlib figures: one plot each, of a width that a phone can show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpisjax.analysis.anytime import Record, early_exit
from mpisjax.training.evaluation import Evaluation

TRAIN, VALIDATION, TEST = "#2a6fbb", "#d1495b", "#3a3a3a"
COLORS = (TRAIN, VALIDATION, "#3d8b5f", "#b07d1a", "#7a5aa6", TEST)
SHOWN_NEURONS = 40
WIDTH, HEIGHT = 4.6, 3.2  # inches
# Of a confusion matrix: classes whose counts fit, classes that can be named, letters of a name and of a row of names.
MOST_COUNTED, MOST_NAMED, LONGEST_NAME, LONGEST_ROW = 12, 25, 14, 24


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which keeps global state and may look for a screen."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG with its words as text, and no date."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpisjax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def panel(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure of one plot."""
    figure = new_figure(WIDTH, HEIGHT)
    axis = figure.subplots()
    tidy(axis, title, x, y)
    return figure, axis


def tidy(axis: Any, title: str, x: str, y: str) -> None:
    """Sets title and labels, and draws a light grid behind."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Shares of each true class, with counts written in where they fit.

    Args:
        matrix: int [classes, classes]: row true class, column answer.
        names: Of the classes. Long ones are cut, and of many classes every second, third, ... is named.
    """
    classes = len(matrix)
    figure = new_figure(WIDTH, 4.1)
    axis = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if classes <= MOST_COUNTED:
        for row in range(classes):
            for column in range(classes):
                if matrix[row, column]:
                    color = "white" if share[row, column] > 0.55 else "#222222"
                    axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=color)
    named = range(0, classes, -(-classes // MOST_NAMED))
    short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    labels, size = [short[n] for n in named], 9 if classes <= MOST_COUNTED else 7
    turned = sum(map(len, labels)) > LONGEST_ROW
    axis.set_xticks(named, labels, fontsize=size, rotation=90 if turned else 0)
    axis.set_yticks(named, labels, fontsize=size)
    axis.set_xlabel("answer")
    axis.set_ylabel("true class")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    return figure


def contact_sheet(images: np.ndarray, titles: list[str], columns: int = 4) -> Figure:
    """Small pictures in rows, a title over each.

    Args:
        images: uint8 [n, H, W, C], or [n, T, H, W, C] of frames, whose sum over time is shown.
        titles: n of them.
        columns: Pictures in a row.
    """
    rows = -(-len(images) // columns)
    figure = new_figure(WIDTH, 1.5 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        picture = np.asarray(image, np.float64)
        picture = picture.sum(0) if picture.ndim == 4 else picture
        if picture.shape[-1] not in (1, 3):
            picture = picture.sum(-1, keepdims=True)
        if picture.shape[-1] == 1 or image.ndim == 4:
            picture = picture / max(float(picture.max()), 1.0)
        else:
            picture = picture / 255
        axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=7)
    return figure


def firing_rates(rates: dict[str, float]) -> Figure:
    """A bar a population."""
    figure = new_figure(WIDTH, 0.9 + 0.36 * len(rates))
    axis = figure.subplots()
    names = list(rates)[::-1]
    values = [rates[n] for n in names]
    bars = axis.barh(names, values, color=TRAIN, height=0.6)
    axis.bar_label(bars, [f"{v:.3f}" for v in values], padding=3, fontsize=8)
    axis.set_xlim(0, max([*values, 1e-6]) * 1.18)
    tidy(axis, "", "spikes per neuron and time step", "")
    axis.grid(visible=False, axis="y")
    return figure


def some_neurons(fired: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` neurons that fire, evenly from the quietest to the busiest.

    The busiest alone would all be saturated, and a random choice mostly silent.

    Args:
        fired: bool [time, neurons].
        count: The most neurons.
    """
    spikes = fired.sum(0)
    order = np.argsort(spikes, kind="stable")
    ranked = order[spikes[order] > 0]
    places = np.linspace(0, max(len(ranked) - 1, 0), min(count, len(ranked)))
    return ranked[np.rint(places).astype(int)]


def raster(spikes: dict[str, np.ndarray]) -> Figure:
    """One panel for each population, a tick for each spike, of some of the neurons that fire."""
    figure = new_figure(WIDTH, 0.6 + 1.1 * len(spikes))
    axes = np.atleast_1d(figure.subplots(len(spikes), 1, sharex=True))
    for axis, (name, fired) in zip(axes, spikes.items(), strict=True):
        chosen = some_neurons(fired, SHOWN_NEURONS)
        steps, neurons = np.nonzero(fired[:, chosen])
        # One line with gaps is a tenth of the file that a marker for each spike is.
        ticks = np.stack([neurons - 0.4, neurons + 0.4, np.full(len(neurons), np.nan)], 1)
        axis.plot(np.repeat(steps + 1, 3), ticks.ravel(), linewidth=1.3, color=TRAIN)
        axis.set_ylim(-1, max(len(chosen), 1))
        axis.set_xlim(0.3, len(fired) + 0.7)
        active = f"{int(fired.any(0).sum()):,} of {fired.shape[1]:,} neurons fire"
        axis.set_title(f"{name}: {active}", fontsize=9, loc="left")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("time step")
    return figure


def settling(title: str, norms: Any) -> Figure:
    """A norm against the time step by stream, mean over samples, on logarithmic axes.

    Args:
        title: What is drawn.
        norms: A pytree like the rates, of [num_steps, batch].
    """
    figure, axis = panel(title, "time step t", "norm, mean over samples")
    for color, (place, values) in zip(COLORS, jax.tree_util.tree_leaves_with_path(norms), strict=False):
        name = jax.tree_util.keystr(place, simple=True, separator="/") or "rates"
        mean = np.asarray(values).mean(1)
        axis.plot(np.arange(1, len(mean) + 1), np.where(mean > 0, mean, np.nan), color=color, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=9)
    return figure


def radii(values: np.ndarray) -> Figure:
    """The spectral radius of each example, from the smallest to the largest, and the line at 1."""
    figure, axis = panel("spectral radius of the Jacobian", "example, by radius", "spectral radius")
    axis.plot(np.arange(1, len(values) + 1), np.sort(values), "o", color=TRAIN, markersize=4)
    axis.axhline(1, color=VALIDATION, linewidth=1)
    axis.annotate("stable below", (1, 1), xytext=(0, -4), textcoords="offset points", va="top", fontsize=8)
    axis.set_ylim(0, max(1.1, 1.1 * float(np.max(values))))
    return figure


def against_steps(found: Sequence[Evaluation]) -> Figure:
    """Accuracy against T."""
    figure, axis = panel("accuracy against latency", "time steps T", "% correct")
    steps = [round(one.num_steps) for one in found]
    _accuracies(axis, steps, found)
    axis.set_xticks(steps, [str(t) for t in steps])
    axis.minorticks_off()
    return figure


def against_work(found: Sequence[Evaluation], synops: Sequence[float]) -> Figure:
    """Accuracy against the synaptic operations of a sample."""
    title = "accuracy against work, T at each point"
    figure, axis = panel(title, "million synaptic operations a sample", "% correct")
    millions = [number / 1e6 for number in synops]
    _accuracies(axis, millions, found)
    for one, x in zip(found, millions, strict=True):
        steps, at = f"{one.num_steps:.0f}", (x, 100 * one.accuracy)
        axis.annotate(steps, at, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axis.margins(y=0.12)
    return figure


def _accuracies(axis: Axes, x: Sequence[float], found: Sequence[Evaluation]) -> None:
    for key, label, color in (("accuracy", "as trained", TRAIN), ("accuracy_spikes", "spikes alone", VALIDATION)):
        values = [100 * getattr(one, key) for one in found]
        axis.plot(x, values, "o-", color=color, label=label, markersize=4)
    axis.set_xscale("log")
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def anytime(found: Record) -> Figure:
    """Accuracy by spikes alone against the steps used: after a fixed number, and at the first sure answer."""
    figure, axis = panel("answers that come early", "time steps used, mean", "% correct")
    fixed = 100 * np.asarray(found.correct).mean(1)
    axis.plot(np.arange(1, len(fixed) + 1), fixed, "o-", color=TRAIN, label="after T steps", markersize=3)
    exits = [early_exit(found, float(threshold)) for threshold in 1 - np.geomspace(0.8, 1e-4, 64)]
    axis.plot(
        [e.mean_steps for e in exits],
        [100 * e.accuracy for e in exits],
        color=VALIDATION,
        label="at the first sure answer",
    )
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
