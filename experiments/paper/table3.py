"""Table 3: two streams against IDE-Net, one stream with spectrally normalised feedback, at equal size."""

from __future__ import annotations

from typing import Any

from experiments.nets import Net
from experiments.paper import reported
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import across_seeds, mean, of_seeds, table, verdict

TITLE = "Table 3: MPIS against IDE-Net at equal size"


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return [net for pair in scale.single_stream for net in pair]


def run(study: Study) -> dict[str, Any]:
    """Trains both; gives the rows."""
    rows = study.rows("table3", pairs=[[described(net) for net in pair] for pair in study.scale.single_stream])
    for net in nets(study.scale):
        study.train_rows(rows, net)
    return rows.finish()


def render(content: dict[str, Any]) -> str:
    """The table, and who wins."""
    lines: list[list[str]] = []
    sentences: list[str] = []
    for pair in content["pairs"]:
        accuracies: list[list[float]] = []
        for net in pair:
            runs = of_seeds(content, net["name"])
            worst = [max(r["residual"].values()) for r in runs]
            lines.append(
                [
                    *reported.beside(net, runs),
                    across_seeds(worst, 3),
                ]
            )
            accuracies.append([r["accuracy"] for r in runs])
        if all(accuracies):
            sentences.append(verdict(content, pair[0]["data"], ("MPIS", "IDE-Net"), "size, T and epochs", accuracies))
    header = [
        "data",
        "network",
        "T",
        "parameters, paper",
        "ours",
        "accuracy, paper, %",
        "ours, %",
        "spikes alone, %",
        "residual",
    ]
    about = (
        "IDE-Net is one implicit stream of several layers, with feedback of operator norm below 1 "
        '(`model.feedback_norm = "spectral"`) and a dense layer on its rates. It is wider, to have as many parameters. '
        "The residual is the worst stream's ||f(r) - r|| / ||f(r)|| after T steps."
    )
    return "\n\n".join(p for p in (table(header, lines, 2), " ".join(filter(None, sentences)), about) if p)


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, a bar a network."""
    import numpy as np

    from mpisjax.analysis.figures import COLORS, WIDTH, new_figure, tidy

    found = [(net, of_seeds(content, net["name"])) for pair in content["pairs"] for net in pair]
    if not all(runs for _, runs in found):
        return {}
    figure = new_figure(WIDTH, 1.0 + 0.55 * len(found))
    axis = figure.subplots()
    names = [f"{net['data']}\n{net['title']}" for net, _ in found]
    for offset, key, label, color in (
        (-0.2, "accuracy", "equivalent path", COLORS[0]),
        (0.2, "accuracy_spikes", "spikes alone", COLORS[1]),
    ):
        values = [100 * mean([r[key] for r in runs]) for _, runs in found]
        bars = axis.barh(np.arange(len(found)) + offset, values, 0.36, color=color, label=label)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(found)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 118)
    tidy(axis, "", "% correct, test split", "")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    return {"accuracy": figure}
