"""The drawings of a report, as matplotlib figures."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpisjax.analysis.convergence import Curves
from mpisjax.analysis.measure import Measurement

TRAIN, VALIDATION, TEST = "#2a6fbb", "#d1495b", "#3a3a3a"
COLORS = (TRAIN, VALIDATION, "#3d8b5f", "#b07d1a", "#7a5aa6", TEST)
SHOWN_NEURONS = 40


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


def as_uri(figure: Figure) -> str:
    """The figure as a PNG in a data URI."""
    return f"data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}"


def tidy(axis: Any, title: str, x: str, y: str) -> None:
    """Sets title and labels, and draws a light grid behind."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def confusion(matrix: np.ndarray) -> Figure:
    """Shares of each true class, with counts written in where they fit."""
    classes = len(matrix)
    figure = new_figure(5.6, 5.0)
    axis = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if classes <= 12:
        for row in range(classes):
            for column in range(classes):
                if matrix[row, column]:
                    color = "white" if share[row, column] > 0.55 else "#222222"
                    axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(classes))
        axis.set_yticks(range(classes))
    axis.set_xlabel("answer")
    axis.set_ylabel("true class")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    return figure


def contact_sheet(images: np.ndarray, titles: list[str], columns: int = 8) -> Figure:
    """Small pictures in rows, a title over each.

    Args:
        images: uint8 [n, H, W, C], or [n, T, H, W, C] of frames, whose sum over time is shown.
        titles: n of them.
        columns: Pictures in a row.
    """
    rows = -(-len(images) // columns)
    figure = new_figure(11.4, 1.75 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
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
    figure = new_figure(5.6, 0.9 + 0.42 * len(rates))
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
    figure = new_figure(11.4, 1.1 + 1.25 * len(spikes))
    axes = np.atleast_1d(figure.subplots(len(spikes), 1, sharex=True))
    for axis, (name, fired) in zip(axes, spikes.items(), strict=True):
        chosen = some_neurons(fired, SHOWN_NEURONS)
        steps, neurons = np.nonzero(fired[:, chosen])
        axis.scatter(steps + 1, neurons, marker="|", s=14, linewidths=1.1, color=TRAIN)
        axis.set_ylim(-1, len(chosen))
        axis.set_xlim(0.3, len(fired) + 0.7)
        active = f"{int(fired.any(0).sum()):,} of {fired.shape[1]:,} neurons fire"
        axis.set_title(f"{name}: {active}; {len(chosen)} of them, the busiest on top", fontsize=9, loc="left")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("time step")
    return figure


def convergence(curves: Curves) -> Figure:
    """Both norms against the time step, by stream: mean over samples, on logarithmic axes."""
    figure = new_figure(11.4, 4.0)
    left, right = figure.subplots(1, 2, sharex=True)
    for axis, values, title in (
        (left, curves.change, "change in a step, ‖r(t) - r(t-1)‖"),
        (right, curves.residual, "residual, ‖f(r(t)) - r(t)‖"),
    ):
        for color, name in zip(COLORS, values, strict=False):
            mean = np.asarray(values[name]).mean(1)
            axis.plot(np.arange(1, len(mean) + 1), np.where(mean > 0, mean, np.nan), color=color, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        tidy(axis, title, "time step t", "norm, mean over samples")
        axis.legend(frameon=False, fontsize=9)
    return figure


def against_steps(measurements: list[Measurement]) -> Figure:
    """Accuracy against T, and against SynOps."""
    figure = new_figure(11.4, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = [m.num_steps for m in measurements]
    events = [sum(m.cost.synops.values()) / 1e6 for m in measurements]
    for key, label, color in (
        ("accuracy", "as trained", TRAIN),
        ("accuracy_spikes", "spikes alone", VALIDATION),
    ):
        values = [100 * getattr(m, key) for m in measurements]
        left.plot(steps, values, "o-", color=color, label=label, markersize=4)
        right.plot(events, values, "o-", color=color, label=label, markersize=4)
    for t, x, y in zip(steps, events, [100 * m.accuracy for m in measurements], strict=True):
        right.annotate(f"T = {t}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    tidy(left, "accuracy against latency", "time steps T", "% correct")
    tidy(right, "accuracy against work", "million synaptic operations a sample", "")
    for axis in (left, right):
        axis.set_xscale("log")
    left.set_xticks(steps, [str(t) for t in steps])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=9)
    return figure
