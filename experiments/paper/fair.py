"""The fair fight: methods and networks of equal size, trained for as many epochs, each with a recipe of its own.

The first network is MPIS with two streams. The others differ in one thing: the number of streams, the feedback
(IDE-Net; none at all), or the gradient (through time).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.nets import Net
from experiments.paper.table1 import timing
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import FEWEST_SEEDS, MISSING, across_seeds, mean, of_seeds, table, verdict

TITLE = "Equal size, equal epochs: what each method reaches"
SEVERAL = 30  # time steps of the second test, which no network was trained for but BPTT's of T = 30


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return list(scale.fair)


def run(study: Study) -> dict[str, Any]:
    """Trains every network, and measures it after as many time steps as it was trained for, and after more."""
    described_nets = [{**described(net), "training_steps": net.training_steps()} for net in nets(study.scale)]
    rows = study.rows("fair", nets=described_nets)
    for net in nets(study.scale):
        study.seed_rows(rows, net, partial(study.tested, net, (net.steps, SEVERAL)))
        if study.timing:
            rows.row(f"{net.name} time", study.settings(net, what="time"), partial(timing, study, net))
    return rows.finish()


def render(content: dict[str, Any]) -> str:
    """The table, and how the first network compares with each of the others."""
    lines: list[list[str]] = []
    sentences: list[str] = []
    first: list[float] = []
    for net in content["nets"]:
        runs = of_seeds(content, net["name"])
        tests = [r["tests"] for r in runs]
        time = content["rows"].get(f"{net['name']} time")
        seconds = f"{time['result']['seconds'] * net['training_steps']:,.0f}" if time else "not timed"
        lines.append(
            [
                net["title"],
                f"{runs[0]['parameters']:,}" if runs else MISSING,
                str(net["epochs"]),
                seconds,
                str(net["steps"]),
                across_seeds([t[0]["accuracy"] for t in tests], factor=100),
                across_seeds([t[0]["accuracy_spikes"] for t in tests], factor=100),
                across_seeds([t[0]["synops"] for t in tests], factor=1e-6),
                across_seeds([t[1]["accuracy"] for t in tests], factor=100),
                across_seeds([t[1]["accuracy_spikes"] for t in tests], factor=100),
                across_seeds([max(t[1]["residual"].values()) for t in tests], 3),
            ]
        )
        accuracies = [t[0]["accuracy"] for t in tests]
        if not first:
            first = accuracies
        elif accuracies and net["epochs"] == content["nets"][0]["epochs"]:
            names = (content["nets"][0]["title"], net["title"])
            sentences.append(verdict(content, net["data"], names, "size and epochs", [first, accuracies]))
    header = [
        "network",
        "parameters",
        "epochs",
        "seconds",
        "T",
        "its answer, %",
        "spikes alone, %",
        "million SynOps",
        f"T = {SEVERAL}: its answer, %",
        "spikes alone, %",
        "residual",
    ]
    about = (
        "A network that was trained by its equilibrium answers by the equivalent path, one step of the rate map on "
        "what the spikes found. One that was trained through time (BPTT) answers by its spikes. Seconds are those of "
        "all training steps: the median of ten on an idle machine, with the weights of the start, times their number. "
        "SynOps are of a sample, at T. The residual is the worst stream's ||f(r) - r|| / ||f(r)|| after "
        f"{SEVERAL} steps."
    )
    if len(first) < FEWEST_SEEDS:
        sentences = [f"It takes {FEWEST_SEEDS} seeds of each to compare them, and this table has {len(first)}."]
    return "\n\n".join(
        part for part in (table(header, lines), "\n".join(f"- {s}" for s in sentences if s), about) if part
    )


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against seconds of training, and against synaptic operations, with the deviation of the seeds."""
    import statistics

    from mpisjax.analysis.figures import COLORS, new_figure, tidy

    found = [(net, of_seeds(content, net["name"])) for net in content["nets"]]
    figures: dict[str, Any] = {}
    for name, label in (("seconds", "seconds of training, two cores"), ("synops", "million SynOps a sample")):
        points: list[tuple[str, float, list[float]]] = []
        for net, runs in found:
            time = content["rows"].get(f"{net['name']} time")
            if not runs or (name == "seconds" and time is None):
                continue
            accuracies = [100 * r["tests"][0]["accuracy"] for r in runs]
            if name == "seconds":
                x = time["result"]["seconds"] * net["training_steps"]
            else:
                x = mean([r["tests"][0]["synops"] for r in runs]) / 1e6
            points.append((net["title"], x, accuracies))
        if len(points) < 2:
            continue
        figure = new_figure(8.5, 3.8)
        axis = figure.subplots()
        tidy(axis, "", label, "% correct, test split")
        for i, (title, x, values) in enumerate(points):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            marker = "o" if i < len(COLORS) else "s"
            axis.plot(x, mean(values), marker, color=COLORS[i % len(COLORS)], label=title)
            if spread:
                axis.errorbar(x, mean(values), spread, fmt="none", color=COLORS[i % len(COLORS)], capsize=3)
        axis.set_xlim(0)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figures[name] = figure
    return figures
