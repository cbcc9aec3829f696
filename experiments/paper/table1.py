"""Table 1: the implicit method against backpropagation through time, on the same network, T and epochs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.nets import Net
from experiments.paper import reported
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, across_seeds, of_seeds, table, verdict

TITLE = "Table 1: the implicit method against backpropagation through time"
KINDS = ("ours", "other")
MIB = 2**20
LINEAR, FLAT = 0.99, 0.02  # r^2 of memory that grows linearly; growth of memory that does not depend on T


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return [net for pair in scale.through_time for net in pair]


def run(study: Study) -> dict[str, Any]:
    """Trains, times a step and compiles for several T; gives the rows."""
    pairs, at = study.scale.through_time, study.scale.memory_steps
    rows = study.rows("table1", pairs=[[described(net) for net in pair] for pair in pairs], memory_steps=list(at))
    for net in nets(study.scale):
        study.train_rows(rows, net)
        if study.timing:
            rows.row(f"{net.name} time", study.settings(net, what="time"), partial(timing, study, net))
    # Last, so that whoever interrupts has the accuracies.
    for net, steps in [(net, net.steps) for net in nets(study.scale)] + [(net, t) for net in pairs[0] for t in at]:
        settings = {**study.settings(net), "forward.num_steps": steps, "what": "memory"}
        rows.row(_memory_key(net.name, steps), settings, partial(memory, study, net, steps))
    return rows.finish()


def _memory_key(name: str, steps: int) -> str:
    return f"{name} memory {steps}"


def _step(study: Study, net: Net, num_steps: int) -> tuple[Any, Any]:
    """The training step for `num_steps` and its arguments."""
    from mpisjax.configuration import makers
    from mpisjax.training.run import assemble

    config = study.config(net, 0)
    config.forward.num_steps = num_steps
    parts = assemble(config)
    step = makers.make_train_step(config, parts.net, parts.dataset, parts.feed.steps_per_epoch, parts.mesh)
    return step, (parts.state, parts.feed.batch(0))


def memory(study: Study, net: Net, num_steps: int) -> dict[str, Any]:
    """Bytes that the compiled training step needs on a device beside arguments and results."""
    from benchmarks.timing import compiled

    step, arguments = _step(study, net, num_steps)
    return {"steps": num_steps, "temporary": compiled(step, *arguments).temporary}


def timing(study: Study, net: Net) -> dict[str, Any]:
    """Seconds of a training step: median of ten."""
    import jax
    import jax.numpy as jnp

    from benchmarks.timing import measure

    step, (state, batch) = _step(study, net, net.steps)
    found = measure(step, lambda: (jax.tree.map(jnp.copy, state), batch), repeats=10, budget=60.0)
    return {"seconds": found.seconds, "repeats": found.repeats}


def fit(steps: Any, sizes: Any) -> tuple[float, float, float]:
    """A straight line through memory against T: `(slope, value at 0, r^2)`; a constant has r^2 = 1."""
    steps, sizes = np.asarray(steps, float), np.asarray(sizes, float)
    slope, offset = np.polyfit(steps, sizes, 1)
    total = np.sum((sizes - sizes.mean()) ** 2)
    residual = np.sum((sizes - slope * steps - offset) ** 2)
    return float(slope), float(offset), 1.0 if total == 0 else float(1 - residual / total)


def growth(sizes: Any) -> float:
    """By which share of the least the sizes differ."""
    return max(sizes) / min(sizes) - 1


def render(content: dict[str, Any]) -> str:
    """The table, the fits, and who wins."""
    rows: dict[str, Any] = content["rows"]
    lines: list[list[str]] = []
    sentences: list[str] = []
    for pair in content["pairs"]:
        accuracies: list[list[float]] = []
        for net in pair:
            runs = of_seeds(content, net["name"])
            step, time = rows.get(_memory_key(net["name"], net["steps"])), rows.get(f"{net['name']} time")
            lines.append(
                [
                    net["data"],
                    net["title"],
                    str(net["steps"]),
                    f"{runs[0]['parameters']:,}" if runs else MISSING,
                    reported.accuracy(net["data"], net["title"], net["steps"]),
                    across_seeds([r["accuracy"] for r in runs], factor=100),
                    across_seeds([r["accuracy_spikes"] for r in runs], factor=100),
                    f"{1000 * time['result']['seconds']:.0f}" if time else "not timed",
                    f"{step['result']['temporary'] / MIB:.1f}" if step else MISSING,
                ]
            )
            accuracies.append([r["accuracy"] for r in runs])
        if all(accuracies):
            where = f"{pair[0]['data']}, T = {pair[0]['steps']}"
            sentences.append(verdict(content, where, ("MPIS", "BPTT"), "T, size and epochs", accuracies))
    header = [
        "data",
        "network",
        "T",
        "parameters",
        "paper, %",
        "ours, %",
        "spikes alone, %",
        "ms a step",
        "MiB a step",
    ]
    parts = [table(header, lines, 2)]
    parts.append(" ".join(list(filter(None, sentences)) + _memory_sentences(content)))
    parts.append(
        "Accuracies are of the test split; held-out training examples chose the state. The implicit method answers by "
        "the equivalent path, BPTT by its own readout. Memory is what the compiled training step needs on a device "
        "beside its arguments and results."
    )
    return "\n\n".join(p for p in parts if p)


def _memory(content: dict[str, Any], kind: str) -> tuple[list[int], list[int]]:
    name = content["pairs"][0][KINDS.index(kind)]["name"]
    found = [content["rows"].get(_memory_key(name, t)) for t in content["memory_steps"]]
    found = [row["result"] for row in found if row is not None]
    return [r["steps"] for r in found], [r["temporary"] for r in found]


def _memory_sentences(content: dict[str, Any]) -> list[str]:
    (_, ours), (other_at, other) = (_memory(content, kind) for kind in KINDS)
    if len(ours) < 3 or len(other) < 3:
        return []
    slope, _, r_squared = fit(other_at, other)
    linear = "grows linearly in T" if r_squared > LINEAR else "does not fit a straight line in T"
    share = growth(ours)
    flat = "does not depend on T" if share <= FLAT else "grows with T"
    return [
        f"BPTT's compiled memory {linear}: {slope / MIB:.3g} MiB a time step, r² = {r_squared:.5f} over T = "
        f"{', '.join(map(str, other_at))}. The implicit method's {flat}: it varies by {100 * share:.2f}%."
    ]


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Memory against T."""
    from mpisjax.analysis.figures import COLORS, panel

    title = f"training step, {content['pairs'][0][0]['data']}"
    figure, axis = panel(title, "time steps T", "temporary memory a device, MiB")
    for color, kind, label in zip(COLORS, KINDS, ("MPIS, implicit", "BPTT"), strict=False):
        steps, sizes = _memory(content, kind)
        if len(steps) < 2:
            return {}
        axis.plot(steps, np.asarray(sizes) / MIB, "o", color=color, label=label)
        slope, offset, r_squared = fit(steps, sizes)
        line = np.array([0, max(steps)])
        text = f"{slope / MIB:.3g} MiB a step, r² = {r_squared:.4f}"
        if growth(sizes) <= FLAT:
            text = f"varies by {100 * growth(sizes):.2f}%"
        axis.plot(line, (offset + slope * line) / MIB, "-", lw=1, color=color, label=text)
    axis.set_ylim(0)
    axis.legend(frameon=False, fontsize=9)
    return {"memory": figure}
