"""The gradient audit: how good each way to the gradient is, layer by layer, on a trained network."""

from __future__ import annotations

import textwrap
from functools import partial
from typing import Any

import numpy as np

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, of_seeds, table

TITLE = "Gradient audit"


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return [scale.audited]


def run(study: Study) -> dict[str, Any]:
    """Compares the gradients of one batch; gives the rows."""
    net, scale = study.scale.audited, study.scale
    rows = study.rows("audit", nets=[described(net)])
    for seed in scale.seeds:
        settings = study.settings(net, seed, what="audit", samples=scale.followed, surrogates=scale.surrogates)
        rows.row(f"{net.name} seed {seed}", settings, partial(compare, study, net, seed))
    return rows.finish()


def compare(study: Study, net: Net, seed: int) -> dict[str, Any]:
    """Cosine and norm ratio by method and layer; the reason if the network has no fixed point."""
    from mpisjax.analysis.audit import gradient_audit
    from mpisjax.errors import UserError

    trained = study.trained(net, seed)
    images, labels = trained.first("train", study.scale.followed)
    try:
        audit = gradient_audit(
            trained.network,
            trained.variables,
            images,
            labels,
            neuron=trained.neuron,
            num_steps=net.steps,
            surrogates=study.scale.surrogates,
        )
    except UserError as error:
        return {"refused": str(error)}
    agreements = {
        method: {layer: [_plain(a.cosine), _plain(a.norm_ratio)] for layer, a in by_layer.items()}
        for method, by_layer in audit.agreements.items()
    }
    return {"reference": audit.reference, "samples": len(labels), "agreements": agreements}


def _plain(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def render(content: dict[str, Any]) -> str:
    """A row a layer, a column a method, of the first seed."""
    (net,) = content["nets"]
    runs = of_seeds(content, net["name"])
    if not runs:
        return f"{net['data']}, {net['title']}, T = {net['steps']}: {MISSING}."
    first = runs[0]
    if "refused" in first:
        return f"{net['data']}, {net['title']}, T = {net['steps']}: {first['refused']}"

    def cell(value: list[float | None]) -> str:
        cosine, ratio = value
        return "-" if cosine is None or ratio is None else f"{cosine:.3f}\N{NO-BREAK SPACE}({ratio:.2f})"

    layers = list(next(iter(first["agreements"].values())))
    lines = [[layer, *(cell(by_layer[layer]) for by_layer in first["agreements"].values())] for layer in layers]
    about = (
        f"{net['data']}, {net['title']}, T = {net['steps']}. Each cell has the cosine with the reference gradient and, "
        f"in brackets, the ratio of the norms. The reference is {first['reference']}, on {first['samples']} training "
        f"examples with running statistics, seed {content['seeds'][0]}. The paper has no such table."
    )
    return f"{table(['layer', *first['agreements']], lines)}\n\n{about}"


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Cosine of the whole gradient, a bar a method."""
    from mpisjax.analysis.figures import COLORS, WIDTH, new_figure, tidy

    (net,) = content["nets"]
    runs = [r for r in of_seeds(content, net["name"]) if "agreements" in r]
    if not runs:
        return {}
    methods = list(runs[0]["agreements"])
    values = [np.mean([r["agreements"][m]["all"][0] or 0.0 for r in runs]) for m in methods]
    figure = new_figure(WIDTH, 0.9 + 0.42 * len(methods))
    axis = figure.subplots()
    names = [textwrap.fill(method, 22) for method in methods]
    bars = axis.barh(names[::-1], values[::-1], color=COLORS[0], height=0.6)
    axis.bar_label(bars, [f"{v:.3f}" for v in values[::-1]], padding=3, fontsize=8)
    axis.set_xlim(min(0.0, *values), 1.25)
    tidy(axis, "", "cosine, all layers", "")
    return {"cosine": figure}
