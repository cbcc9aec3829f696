"""Table 4: few time steps: accuracy by size and T."""

from __future__ import annotations

from typing import Any

from experiments.nets import Net
from experiments.paper import reported
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import mean, of_seeds, table

TITLE = "Table 4: few time steps"


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return list(scale.latency)


def run(study: Study) -> dict[str, Any]:
    """Trains; gives the rows."""
    rows = study.rows("table4", nets=[described(net) for net in study.scale.latency])
    for net in nets(study.scale):
        study.train_rows(rows, net)
    return rows.finish()


def render(content: dict[str, Any]) -> str:
    """A row a network and T."""
    lines = []
    for net in content["nets"]:
        runs = of_seeds(content, net["name"])
        lines.append(reported.beside(net, runs))
    header = [
        "data",
        "network",
        "T",
        "parameters, paper",
        "ours",
        "accuracy, paper, %",
        "ours, %",
        "spikes alone, %",
    ]
    about = "Each network is trained and tested with T steps of spikes."
    return f"{table(header, lines, 2)}\n\n{about}"


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against T, a line a data set and size."""
    from mpisjax.analysis.figures import COLORS, panel

    series: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for net in content["nets"]:
        if runs := of_seeds(content, net["name"]):
            values = [100 * mean([r[key] for r in runs]) for key in ("accuracy", "accuracy_spikes")]
            series.setdefault((net["data"], net["title"]), []).append((net["steps"], *values))
    if not series:
        return {}
    figure, axis = panel("", "time steps T", "% correct, test split")
    for color, ((data, title), points) in zip(COLORS, series.items(), strict=False):
        steps, equivalent, spikes = zip(*sorted(points), strict=True)
        axis.plot(steps, equivalent, "o-", color=color, label=f"{data}, {title}: equivalent path")
        axis.plot(steps, spikes, "o--", color=color, mfc="white", label=f"{data}, {title}: spikes alone")
    axis.set_xscale("log")
    ticks = sorted({p[0] for points in series.values() for p in points})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return {"accuracy": figure}
