"""The gradient audit: how good each way to the gradient is, layer by layer, on a trained network."""

from __future__ import annotations

import re
import textwrap
from functools import partial
from typing import Any

import numpy as np

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, of_seeds, table

TITLE = "Gradient audit"
# The parameters of `MPIS`, which count from 0, in the words of docs/method.md, which counts from 1: input to output.
WORDS = {
    r"all": "all",
    r"stem_layers_(\d+)": "stem, layer {1}",
    r"inject": "injection into stream 1",
    r"trans_(\d+)": "feedback of stream {1}",
    r"feb_(\d+)_(\d+)": "stream {1}, layer {2}",
    r"down_(\d+)_(\d+)_(\d+)": "fusion, stream {2} to {1}, convolution {3}",
    r"head_down_(\d+)_(\d+)": "head, from stream {1}, convolution {2}",
    r"mix": "head, 1 x 1 convolution",
    r"classifier": "classifier",
}


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


def in_words(name: str) -> tuple[int, str]:
    """A layer's place in the table and its name there, which is its own where docs/method.md has no word for it."""
    for place, (pattern, words) in enumerate(WORDS.items()):
        if found := re.fullmatch(pattern, name):
            numbers = [int(n) + 1 for n in found.groups()]
            if pattern.startswith("feb"):  # its convolutions begin at layer 2: Trans gives layer 1
                numbers[1] += 1
            return place, words.format(None, *numbers)
    return len(WORDS), name


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

    methods = first["agreements"].values()
    layers = sorted((*in_words(layer), layer) for layer in next(iter(methods)))
    lines = [[words, *(cell(by_layer[layer]) for by_layer in methods)] for _, words, layer in layers]
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
