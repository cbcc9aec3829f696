"""Figure 3: how firing rates settle, two streams against one at equal parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, of_seeds, table

TITLE = "Figure 3: convergence of the firing rates"
SHOWN = (1, 3, 10, 30, 100)


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return list(scale.convergence)


def run(study: Study) -> dict[str, Any]:
    """Follows the rates of both networks; gives the rows."""
    scale = study.scale
    rows = study.rows("fig3", nets=[described(net) for net in scale.convergence])
    for net in scale.convergence:
        for seed in scale.seeds:
            settings = study.settings(net, seed, what="convergence", steps=scale.follow_steps, samples=scale.followed)
            rows.row(f"{net.name} seed {seed}", settings, partial(follow, study, net, seed))
    return rows.finish()


def follow(study: Study, net: Net, seed: int) -> dict[str, Any]:
    """Both norms by stream and step, mean over samples, and the spectral radius at the equilibrium."""
    from mpisjax.analysis.dynamics import dynamics
    from mpisjax.jacobian import warn_near_one
    from mpisjax.nn.model import parameter_count

    trained = study.trained(net, seed)
    images, _ = trained.first("test", study.scale.followed)
    curves, radius = dynamics(
        trained.network,
        trained.variables,
        images,
        neuron=trained.neuron,
        solver=trained.solver,
        num_steps=study.scale.follow_steps,
    )
    return {
        "parameters": parameter_count(trained.variables),
        "curves": {
            kind: {stream: [float(f"{v:.5g}") for v in values.mean(1)] for stream, values in curve.items()}
            for kind, curve in curves._asdict().items()
        },
        "radius": {
            "median": float(np.median(radius.value)),
            "largest": float(radius.value.max()),
            "warning": warn_near_one(radius.value),
        },
    }


def _mean(runs: list[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    return {k: np.mean([r["curves"][kind][k] for r in runs], axis=0) for k in runs[0]["curves"][kind]}


def render(content: dict[str, Any]) -> str:
    """Both norms at some steps, by network and stream, and what they show."""
    lines: list[list[str]] = []
    final: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    radii: list[str] = []
    for net in content["nets"]:
        runs = of_seeds(content, net["name"])
        if not runs:
            lines.append([net["title"], "-", "-", *[MISSING] * len(SHOWN)])
            continue
        change, residual, norm = (_mean(runs, kind) for kind in ("change", "residual", "norm"))
        name = f"{net['title']}, {runs[0]['parameters']:,} parameters"
        for stream in change:
            for what, curve in (
                ("change", change[stream]),
                ("residual", residual[stream]),
                ("relative residual", residual[stream] / np.maximum(norm[stream], 1e-12)),
            ):
                cells = [f"{curve[t - 1]:.3g}" if t <= len(curve) else "-" for t in SHOWN]
                lines.append([name, stream, what, *cells])
        whole = {k: np.sqrt(sum(v[-1] ** 2 for v in c.values())) for k, c in (("residual", residual), ("norm", norm))}
        whole["change"] = np.sqrt(sum(v[-1] ** 2 for v in change.values()))
        final[net["title"]] = whole
        radii.append(f"{net['title']} {runs[0]['radius']['median']:.2f} ({runs[0]['radius']['largest']:.2f} at most)")
        warnings += [r["radius"]["warning"] for r in runs if r["radius"]["warning"]]
    parts = [table(["network", "stream", "norm", *(f"t = {t}" for t in SHOWN)], lines, 3)]
    if len(final) == 2:
        parts.append(_words(final))
        parts.append(f"Spectral radius of the Jacobian at the equilibrium, median over samples: {'; '.join(radii)}.")
    parts += [f"Warning: {w}." for w in warnings]
    parts.append(
        "The change is ||r(t) - r(t-1)||, the residual ||f(r(t)) - r(t)||, each the mean over samples. The relative "
        "residual is divided by ||r(t)||. A small residual proves an equilibrium. A small change does not: the mean of "
        "t steps moves by about 1/t, whatever it tends to. The paper shows its Figure 3 as a plot, and its values are "
        "not known here."
    )
    return "\n\n".join(parts)


def _words(final: dict[str, dict[str, Any]]) -> str:
    a, b = final.values()  # two streams, one
    sentences = []
    for key, what in (("change", "the change"), ("residual", "the residual")):
        relative = a[key] / a["norm"], b[key] / b["norm"]
        order = "smaller" if relative[0] < relative[1] else "not smaller"
        sentences.append(f"{what} is {order} with two streams ({relative[0]:.3g}) than with one ({relative[1]:.3g})")
    return f"At the last step, relative to the rates of all streams, {', and '.join(sentences)}."


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Both norms against the time step, by stream."""
    from mpisjax.analysis.figures import COLORS, panel

    found = [(net, of_seeds(content, net["name"])) for net in content["nets"]]
    if not all(runs for _, runs in found):
        return {}
    figures = {}
    titles = {"change": "change in a step, ‖r(t) - r(t-1)‖", "residual": "residual, ‖f(r(t)) - r(t)‖"}
    for kind, title in titles.items():
        figures[kind], axis = panel(title, "time step t", "norm, mean over samples")
        colors = iter(COLORS)
        for index, (_, runs) in enumerate(found):
            for stream, values in _mean(runs, kind).items():
                axis.plot(
                    np.arange(1, len(values) + 1),
                    np.where(values > 0, values, np.nan),
                    "-" if index == 0 else "--",
                    color=next(colors),
                    label=f"two streams: {stream}" if index == 0 else "one stream",
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=9)
    return figures
