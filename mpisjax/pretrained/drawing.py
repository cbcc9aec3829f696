"""A trace as a picture, as an animation, and in a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpisjax.analysis.figures import COLORS, TEST, WIDTH, new_figure, some_neurons, tidy
from mpisjax.pretrained.inputs import Inputs
from mpisjax.pretrained.trace import Trace

SHOWN_NEURONS = 36  # of a population
SHOWN_CLASSES = 3  # in colour; the others are grey
MOST_BARS = 10  # of more classes, the likeliest have bars
QUIET = "#c9c9c9"
PER_SECOND, PAUSE = 6, 0.15  # frames of the animation, and seconds between time steps in the terminal


class Drawing:
    """Image, raster, classifier and settling rates in one figure, up to any time step.

    Args:
        image: uint8 [H, W, C], as the network sees it.
        trace: What happened.
        inputs: The classes' names.
        title: Above it all.
        answered: The time step whose answer counts.
    """

    def __init__(self, image: np.ndarray, trace: Trace, inputs: Inputs, title: str, answered: int) -> None:
        self.trace, self.inputs, self.steps, self.answered = trace, inputs, len(trace.scores), answered
        self.figure: Figure = new_figure(WIDTH, 2.3 * WIDTH)  # one plot below the other, as wide as a phone can show
        self.figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        self.figure.suptitle(title, fontsize=11)
        grid = self.figure.add_gridspec(4, 2, height_ratios=(1, 2, 1.1, 1.1))
        shown, bars = (self.figure.add_subplot(grid[0, column]) for column in (0, 1))
        shown.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        shown.set_title("what the network sees", fontsize=10)
        shown.axis("off")
        self._draw_bars(bars)
        self._draw_raster(self.figure.add_subplot(grid[1, :]))
        self._draw_scores(self.figure.add_subplot(grid[2, :]))
        self._draw_rates(self.figure.add_subplot(grid[3, :]))
        self.at(self.steps)

    def at(self, step: int) -> list[Any]:
        """Shows the first `step` time steps (1..T); the artists that changed."""
        time = np.arange(1, step + 1)
        for points, (steps, rows) in zip(self._ticks, self._fired, strict=True):
            seen = steps < step
            points.set_offsets(np.column_stack([steps[seen] + 1, rows[seen]]))
        for lines, values in ((self._scores, self.trace.scores.T), (self._rates, self.trace.rates.values())):
            for line, series in zip(lines, values, strict=True):
                line.set_data(time, series[:step])
        for bar, score in zip(self._bars, self.trace.scores[step - 1][self._barred], strict=True):
            bar.set_width(score)
        spikes = self.trace.spikes_until(step)
        self._clock.set_text(f"time step ({step} of {self.steps}: {spikes:,} spikes)")
        return [*self._ticks, *self._scores, *self._rates, *self._bars, self._clock]

    def save_png(self, path: Path) -> None:
        """The whole of it as a picture."""
        self.at(self.steps)
        self.figure.savefig(path, format="png")

    def save_gif(self, path: Path) -> None:
        """Step by step as a GIF, with a pause at the end; it repeats."""
        frames = [*range(1, self.steps + 1), *[self.steps] * (2 * PER_SECOND)]
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # as the first frame laid it out
        animation = FuncAnimation(self.figure, self.at, frames=frames, blit=False)
        animation.save(path, writer=PillowWriter(fps=PER_SECOND), dpi=80)

    def _draw_bars(self, axis: Any) -> None:
        few = self.inputs.num_classes <= MOST_BARS
        self._barred = list(range(self.inputs.num_classes)) if few else self._ranking()[:MOST_BARS]
        colors = self._class_colors()
        places = list(range(len(self._barred)))
        self._bars = axis.barh(places, 0.0, color=[colors[n] for n in self._barred], height=0.7)
        axis.set_yticks(places, [self.inputs.classes[n] for n in self._barred], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        tidy(axis, "classifier", "confidence", "")
        axis.grid(visible=False, axis="y")

    def _draw_raster(self, axis: Any) -> None:
        self._ticks, self._fired, base, labels = [], [], 0, {}
        for color, (name, fired) in zip(COLORS * 9, self.trace.spikes.items(), strict=False):
            chosen = some_neurons(fired, SHOWN_NEURONS)
            steps, rows = np.nonzero(fired[:, chosen])
            self._fired.append((steps, rows + base))
            self._ticks.append(axis.scatter([], [], marker="|", s=16, linewidths=1.3, color=color))
            text = f"{name}\n{int(fired.any(0).sum()):,} of {fired.shape[1]:,}\nneurons fire"
            labels[base + max(len(chosen), 1) / 2] = text
            base += len(chosen) + 4
        axis.set_ylim(-2, base - 2)
        axis.set_xlim(0.4, self.steps + 0.6)
        axis.set_yticks(list(labels), list(labels.values()), fontsize=8)
        axis.tick_params(axis="y", length=0)
        tidy(axis, "spikes of some of the neurons that fire", "time step", "")
        axis.grid(visible=False)
        self._clock = axis.xaxis.label
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for label, color in zip(axis.get_yticklabels(), COLORS * 9, strict=False):
            label.set_color(color)

    def _draw_scores(self, axis: Any) -> None:
        self._scores = [axis.plot([], [], color=color)[0] for color in self._class_colors()]
        for number in self._ranking()[:SHOWN_CLASSES]:
            self._scores[number].set_label(self.inputs.classes[number])
            self._scores[number].set_zorder(3)
        if self.answered < self.steps:
            axis.axvline(self.answered, color=TEST, linewidth=1, linestyle=":")
            side, shift = ("left", 0.2) if 2 * self.answered < self.steps else ("right", -0.2)
            text = f"sure after {self.answered}"
            axis.text(self.answered + shift, 0.6, text, fontsize=8, va="top", ha=side)
        axis.set_xlim(1, max(self.steps, 2))
        axis.set_ylim(-0.02, 1.02)
        tidy(axis, "confidence as the rates settle", "", "")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=8, loc="center right")

    def _draw_rates(self, axis: Any) -> None:
        self._rates = [
            axis.plot([], [], color=color)[0] for color, _ in zip(COLORS * 9, self.trace.rates, strict=False)
        ]
        top = max(float(series.max()) for series in self.trace.rates.values())
        axis.set_xlim(1, max(self.steps, 2))
        axis.set_ylim(0, 1.15 * top or 1)
        tidy(axis, "mean firing rates", "time step", "per neuron and step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    def _ranking(self) -> list[int]:
        return [int(n) for n in np.argsort(-self.trace.scores[self.answered - 1], kind="stable")]

    def _class_colors(self) -> list[str]:
        colors = [QUIET] * self.inputs.num_classes
        for color, number in zip(COLORS, self._ranking()[:SHOWN_CLASSES], strict=False):
            colors[number] = color
        return colors


def show_live(console: Console, trace: Trace, inputs: Inputs) -> None:
    """Plays a trace in the terminal: classes as bars, some neurons of each population as rows of spikes.

    Elsewhere (a file, a pipe) its last frame is printed.

    Args:
        console: Where to.
        trace: What happened.
        inputs: The classes' names.
    """
    if not console.is_terminal:
        console.print(frame(trace, inputs, len(trace.scores)))
        return
    with Live(console=console, auto_refresh=False) as live:
        for step in range(1, len(trace.scores) + 1):
            live.update(frame(trace, inputs, step), refresh=True)
            if step < len(trace.scores):
                time.sleep(PAUSE)


def frame(trace: Trace, inputs: Inputs, step: int) -> Group:
    """One frame of `show_live`: the first `step` time steps."""
    scores, best = Table(box=None, show_header=False, padding=(0, 1)), int(trace.scores[step - 1].argmax())
    for number in np.argsort(-trace.scores[step - 1], kind="stable")[:5]:
        score = float(trace.scores[step - 1][number])
        style = "bold green" if number == best else ""
        bar = Text("█" * round(30 * score), style)
        scores.add_row(Text(inputs.classes[number], style), bar, f"{100 * score:.1f}%")
    rows = Table(box=None, show_header=False, padding=(0, 1))
    first = max(step - 60, 0)
    for name, fired in trace.spikes.items():
        for row, neuron in enumerate(some_neurons(fired, 4)[::-1]):
            marks = "".join("|" if s else "·" for s in fired[first:step, neuron])
            rate = f"rate {trace.rates[name][step - 1]:.3f}" if row == 0 else ""
            rows.add_row(name if row == 0 else "", rate, Text(marks))
    spikes = trace.spikes_until(step)
    return Group(Text(f"step {step} of {len(trace.scores)}, {spikes:,} spikes", "italic"), scores, rows)
