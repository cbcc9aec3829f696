"""Warm starts of the rate solver: how many evaluations of f a better start than zeros would save."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, of_seeds, table

TITLE = "Warm starts of the rate solver"
STARTS = {"zeros": "zeros", "mean": "the mean equilibrium of other examples"}
TOLERANCES = (0.3, 0.1, 0.02)
EVALUATIONS = 60
SHOWN = (1, 2, 4, 8, 16)


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return [scale.audited]


def run(study: Study) -> dict[str, Any]:
    """Follows the solve from every start; gives the rows."""
    scale, net = study.scale, study.scale.audited
    rows = study.rows("warm", nets=[described(net)])
    for seed in scale.seeds:
        settings = study.settings(net, seed, what="warm starts", samples=scale.followed)
        rows.row(f"{net.name} seed {seed}", settings, partial(follow, study, net, seed))
    return rows.finish()


def follow(study: Study, net: Net, seed: int) -> dict[str, Any]:
    """The worst stream's relative residual after every evaluation, mean over samples, by start."""
    import jax
    import jax.numpy as jnp

    from mpisjax.firing import RateReading
    from mpisjax.nn import model
    from mpisjax.residuals import relative_residual, worst
    from mpisjax.simulate import weighted_mean_frame

    trained = study.trained(net, seed)
    network, neuron = trained.network, trained.neuron
    transition = model.transition_of(network)
    followed, _ = trained.first("test", study.scale.followed)
    others, _ = trained.first("train", study.scale.followed)

    @jax.jit
    def solve(variables: Any, images: Any, start: Any) -> tuple[Any, Any]:
        x: Any = network.apply(variables, images, False, method="encode")
        x = weighted_mean_frame(x, neuron.leak) if network.temporal else x

        def evaluation(rates: Any, _: None) -> tuple[Any, Any]:
            new = transition(variables, rates, x, RateReading(neuron))
            return new, jnp.mean(worst(relative_residual(new, rates)))

        return jax.lax.scan(evaluation, start, None, length=EVALUATIONS)

    zeros = network.initial_rates(followed)
    equilibrium, _ = solve(trained.variables, others, zeros)
    mean = jax.tree.map(lambda r: jnp.broadcast_to(jnp.mean(r, 0), r.shape), equilibrium)
    curves = {name: solve(trained.variables, followed, start)[1] for name, start in (("zeros", zeros), ("mean", mean))}
    return {"curves": {name: [float(f"{v:.5g}") for v in np.asarray(curve)] for name, curve in curves.items()}}


def needed(curve: list[float], tolerance: float) -> float | None:
    """Evaluations until the residual is at most `tolerance`, interpolated in its logarithm; None: never."""
    for index, value in enumerate(curve):
        if value <= tolerance:
            if index == 0 or value == 0:
                return float(index + 1)
            before = np.log(curve[index - 1])
            return float(index + (before - np.log(tolerance)) / (before - np.log(value)))
    return None


def render(content: dict[str, Any]) -> str:
    """Evaluations to some tolerances, and residuals after some evaluations, by start."""
    net = content["nets"][0]
    runs = of_seeds(content, net["name"])
    lines, counts = [], {}
    for name, title in STARTS.items():
        if not runs:
            lines.append([title, *[MISSING] * (len(TOLERANCES) + len(SHOWN))])
            continue
        curve = np.mean([r["curves"][name] for r in runs], axis=0).tolist()
        counts[name] = [needed(curve, tol) for tol in TOLERANCES]
        took = [f"over {EVALUATIONS}" if n is None else f"{n:.1f}" for n in counts[name]]
        lines.append([title, *took, *(f"{curve[k - 1]:.3f}" for k in SHOWN)])
    header = [
        "start",
        *(f"evaluations to {t:g}" for t in TOLERANCES),
        *(f"residual after {k}" for k in SHOWN),
    ]
    parts = [table(header, lines)]
    if counts:
        saved = [a - b for a, b in zip(counts["zeros"], counts["mean"], strict=True) if a and b]
        if saved:
            how_many = " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(saved), max(saved))))
            parts.append(f"The warm start saves {how_many} evaluations of f.")
    parts.append(
        f"{net['data']}, {net['title']}, trained with T = {net['steps']}. The residual is relative, of the worst "
        "stream in a plain fixed-point iteration, the mean over samples. Counts are interpolated. The mean equilibrium "
        "knows nothing of a sample or its label. `equilibrium_forward(init=...)` and `model.apply(init=...)` take any "
        "start. Training starts from zeros."
    )
    return "\n\n".join(parts)


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """The residual against evaluations of f, by start."""
    from mpisjax.analysis.figures import COLORS, panel

    runs = of_seeds(content, content["nets"][0]["name"])
    if not runs:
        return {}
    figure, axis = panel("", "evaluations of f", "relative residual, worst stream")
    for color, (name, title) in zip(COLORS, STARTS.items(), strict=False):
        curve = np.mean([r["curves"][name] for r in runs], axis=0)
        axis.plot(np.arange(1, len(curve) + 1), np.where(curve > 0, curve, np.nan), color=color, label=title)
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=9)
    return {"residual": figure}
