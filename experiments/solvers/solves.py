"""How many solver steps training needs: rate mode's gradient beside the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from experiments.nets import Net
from experiments.scales import Scale
from experiments.study import Study, first_examples
from experiments.tables import MISSING, table

TITLE = "Solver steps and the gradient"
Pair = tuple[str, int, float, str, int, float]
# Solver, steps and damping, forward and backward. As `forward.*` and `adjoint.*` of a config.
SOLVES: tuple[Pair, ...] = (
    ("picard", 2, 0.0, "neumann", 2, 0.0),
    ("picard", 4, 0.0, "neumann", 4, 0.0),
    ("picard", 30, 0.0, "neumann", 30, 0.0),
    ("picard", 4, 0.2, "neumann", 4, 0.0),
    ("picard", 4, 0.3, "neumann", 4, 0.3),
    ("picard", 6, 0.2, "neumann", 2, 0.0),
    ("picard", 6, 0.3, "neumann", 2, 0.3),
    ("picard", 6, 0.3, "neumann", 6, 0.3),
    ("picard", 12, 0.2, "neumann", 6, 0.0),
    ("picard", 12, 0.3, "neumann", 12, 0.3),
    ("anderson", 6, 0.0, "anderson", 6, 0.0),
)
SMOKE = (SOLVES[0], SOLVES[1], SOLVES[6], SOLVES[10])  # each is a program to compile, in CI


def nets(scale: Scale) -> list[Net]:
    """Nothing has to be trained."""
    del scale
    return []


def run(study: Study) -> dict[str, Any]:
    """Takes the gradient of one batch by every pair of solves; gives the rows."""
    name, samples = study.scale.packaged, 4 * study.scale.followed
    pairs = SMOKE if study.scale.name == "smoke" else SOLVES
    header = {"network": name, "samples": samples, "solves": [list(pair) for pair in pairs]}
    rows = study.rows("solves", **header)
    rows.row(name, header, partial(measure, study, name, samples, pairs))
    return rows.finish()


def measure(study: Study, name: str, samples: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Steps, residual, cosine and norm ratio of every pair; the reason where there is no fixed point."""
    from mpisjax.analysis.audit import audit_solves
    from mpisjax.errors import UserError
    from mpisjax.pretrained import load_pretrained
    from mpisjax.solvers import Adjoint, RateForward

    found = load_pretrained(name)
    images, labels = first_examples(study.dataset(found.config), "train", samples)
    solves = {
        str(i): (
            RateForward(forward, max_steps=steps, tol=0.0, damping=damping),
            Adjoint(backward, max_steps=back, tol=1e-9, damping=other),
        )
        for i, (forward, steps, damping, backward, back, other) in enumerate(pairs)
    }
    try:
        solved = audit_solves(found.net, found.variables, images, labels, neuron=found.neuron, solves=solves)
    except UserError as error:
        return {"refused": str(error)}
    return {"solves": [[float(f"{v:.4g}") for v in (s.residual, *s.agreement)] for s in solved.values()]}


def render(content: dict[str, Any]) -> str:
    """A row a pair."""
    row = content["rows"].get(content.get("network"))
    if row is None:
        return f"{TITLE}: {MISSING}."
    if "refused" in row["result"]:
        return str(row["result"]["refused"])
    lines = [
        [
            f"{forward}, {steps}",
            f"{damping:g}",
            f"{backward}, {back}",
            f"{other:g}",
            f"{residual:.3f}",
            f"{cosine:.3f}",
            f"{ratio:.2f}",
        ]
        for (forward, steps, damping, backward, back, other), (residual, cosine, ratio) in zip(
            content["solves"], row["result"]["solves"], strict=True
        )
    ]
    header = [
        "forward, evaluations of f",
        "damping",
        "backward, products",
        "damping",
        "residual",
        "cosine",
        "ratio of norms",
    ]
    about = (
        f"The network is `{content['network']}`, as packaged. The whole gradient of one batch of {content['samples']} "
        "training images, with running statistics, is compared with the exact gradient at the fixed point. The "
        "residual is relative, of the worst stream, the mean over samples."
    )
    return f"{table(header, lines)}\n\n{about}"


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """The cosine against all evaluations, a point a pair."""
    from mpisjax.analysis.figures import COLORS, panel

    row = content["rows"].get(content.get("network"))
    if row is None or "refused" in row["result"]:
        return {}
    figure, axis = panel("", "evaluations of f and products with its Jacobian", "cosine with the exact gradient")
    kinds = {"picard": lambda s: s[0] == "picard" and not s[2], "damped picard": lambda s: s[2] > 0}
    kinds["anderson"] = lambda s: s[0] == "anderson"
    for color, marker, (kind, chosen) in zip(COLORS, "osD", kinds.items(), strict=False):
        points = [
            (s[1] + s[4], found[1])
            for s, found in zip(content["solves"], row["result"]["solves"], strict=True)
            if chosen(s)
        ]
        axis.plot(*zip(*sorted(points), strict=True), marker, color=color, label=kind)
    axis.set_xscale("log")
    axis.set_xticks([4, 8, 12, 20, 60], ["4", "8", "12", "20", "60"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=9)
    return {"cosine": figure}
