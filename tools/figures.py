"""The plots of the pages, each a small SVG, from the committed results or from a computation of seconds.

python -m tools.figures                 # writes docs/figures/*.svg
python -m tools.figures latency work    # these alone
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import mpisjax
from mpisjax.analysis.figures import COLORS, new_figure

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure(4.6, 3.2)
    axis = figure.subplots()
    axis.set(xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _numbers(page: str, heading: str) -> list[list[float]]:
    """The rows of numbers in the first table under a heading of a page."""
    text = (ROOT / "docs" / page).read_text().partition(heading)[2]
    table = next(block for block in text.split("\n\n") if block.startswith("|"))
    rows = [re.findall(r"[\d.,]+", line) for line in table.splitlines()[2:]]
    return [[float(n.replace(",", "")) for n in row] for row in rows]


def accuracy() -> Figure:
    """Accuracy of two packaged networks against time steps (docs/pretrained.md)."""
    figure, axis = _axes("time steps T", "test accuracy by spikes alone, %")
    rows = _numbers("pretrained.md", "## Fashion-MNIST, both stages")
    axis.semilogx([r[0] for r in rows], [r[2] for r in rows], "o-", color=COLORS[0], label="trained by rates")
    low = [r for r in rows if len(r) > 5]  # T = 100 was not measured
    axis.semilogx(
        [r[0] for r in low], [r[5] for r in low], "s-", color=COLORS[1], label="and three epochs for few steps"
    )
    axis.set_xticks([1, 2, 4, 8, 30, 100], ["1", "2", "4", "8", "30", "100"])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="lower right")
    return figure


STAGES = (  # of tutorials/low_latency.md: heading, the column of accuracy by spikes alone, label
    ("## 1. What few steps cost", 2, "as trained, from rest"),
    ("## 2. Start at half the threshold", 2, "from half the threshold"),
    ("## 3. A second stage of training", 1, "and a second stage"),
)


def _stages(x: str, column: int) -> Figure:
    """Accuracy by spikes alone of the tutorial's three networks against the first or the last column of its tables."""
    figure, axis = _axes(x, "test accuracy by spikes alone, %")
    for color, marker, (heading, accuracy, label) in zip(COLORS, "osD", STAGES, strict=False):
        rows = _numbers("tutorials/low_latency.md", heading)
        axis.semilogx([r[column] for r in rows], [r[accuracy] for r in rows], f"{marker}-", color=color, label=label)
    axis.legend(frameon=False, loc="lower right")
    return figure


def latency() -> Figure:
    """Accuracy against time steps, of the tutorial's three networks (docs/tutorials/low_latency.md)."""
    figure = _stages("time steps T", 0)
    figure.axes[0].set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    figure.axes[0].minorticks_off()
    return figure


def work() -> Figure:
    """Accuracy against synaptic operations, of the same."""
    return _stages("synaptic operations a sample", -1)


def memory() -> Figure:
    """Memory of a training step against time steps (docs/results/small/table1.json)."""
    figure, axis = _axes("time steps T", "memory of a training step, MiB")
    rows = json.loads((ROOT / "docs" / "results" / "small" / "table1.json").read_text())["rows"]
    for color, kind, label in (
        (COLORS[1], "bptt30", "through time (BPTT)"),
        (COLORS[0], "two30", "by the equilibrium"),
    ):
        found = [row["result"] for name, row in rows.items() if name.startswith(f"fashion_mnist_fair_{kind} memory")]
        points = sorted((r["steps"], r["temporary"] / 2**20) for r in found)
        axis.plot(*zip(*points, strict=True), "o-", color=color, label=label)
    axis.set_ylim(0)
    axis.legend(frameon=False, loc="upper left")
    return figure


def _rates(neuron: mpisjax.Neuron, current: jax.Array, steps: int) -> jax.Array:
    found = mpisjax.simulate(
        lambda p, rates, x, fire: fire("neurons", x),
        (),
        current,
        jnp.zeros_like(current),
        neuron=neuron,
        forward=mpisjax.SpikeForward(steps),
    )
    return found.rates


def neurons() -> Figure:
    """The rate of one neuron against its current, after few and many steps, without and with a leak."""
    figure, axis = _axes("current, in thresholds", "firing rate")
    current = jnp.linspace(-0.3, 1.3, 401)[:, None]
    kinds = (
        ("4 steps", mpisjax.IF(), 4, COLORS[1]),
        ("30 steps", mpisjax.IF(), 30, COLORS[2]),
        ("1000 steps, leak 0.8", mpisjax.LIF(leak=0.8), 1000, COLORS[3]),
    )
    for label, neuron, steps, color in kinds:
        axis.plot(current, _rates(neuron, current, steps), color=color, lw=1, label=label)
    axis.plot(current, jnp.clip(current, 0, 1), "k--", lw=1, label="clip(c, 0, 1)")
    axis.legend(frameon=False)
    return figure


def residual() -> Figure:
    """The residual of the packaged digits network against time steps, without and with a leak."""
    figure, axis = _axes("time steps T", "relative residual")
    trained = mpisjax.load_pretrained("digits")
    from sklearn.datasets import load_digits

    images = np.uint8(load_digits().images[-360:, :, :, None] * 255 / 16)
    from mpisjax.data import prepare_images

    x = prepare_images(jnp.asarray(images), trained.inputs)
    steps = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for label, neuron, color in (
        ("no leak", mpisjax.IF(), COLORS[0]),
        ("leak 0.9", mpisjax.LIF(leak=0.9), COLORS[1]),
    ):

        @jax.jit
        def found(variables: object, neuron: mpisjax.LIF = neuron) -> list[jax.Array]:
            outs = [
                mpisjax.nn.apply(trained.net, variables, x, neuron=neuron, forward=mpisjax.SpikeForward(t))  # type: ignore[arg-type]
                for t in steps
            ]
            return [jnp.mean(jnp.stack(jax.tree.leaves(o.equilibrium.residual))) for o in outs]

        axis.loglog(steps, found(trained.variables), "o-", color=color, label=label)
    axis.loglog(steps, 1 / np.asarray(steps), "k--", lw=1, label="1/T")
    axis.legend(frameon=False)
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (accuracy, latency, work, memory, neurons, residual)


def main(names: Sequence[str] = ()) -> None:
    """Writes every figure, or those that are named."""
    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mpisjax", "svg.fonttype": "none", "font.size": 9}):
        for draw in [one for one in FIGURES if not names or one.__name__ in names]:
            path = FOLDER / f"{draw.__name__}.svg"
            draw().savefig(path, metadata={"Date": None}, bbox_inches="tight")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
