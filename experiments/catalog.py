"""The experiments by name: their modules, what they train, and the page that each writes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from experiments.paper import fair, fig3, table1, table2, table3, table4
from experiments.scales import Scale
from experiments.solvers import audit, solves, tolerance, warm
from experiments.tables import provenance

# A module has TITLE, `nets(scale)`, `run(study)`, `render(content)` and `draw(content)`.
EXPERIMENTS: dict[str, ModuleType] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "fig3": fig3,
    "table4": table4,
    "fair": fair,
    "audit": audit,
    "tolerance": tolerance,
    "warm": warm,
    "solves": solves,
}


def plan(names: tuple[str, ...], scale: Scale) -> str:
    """What would be trained: every run once, with its steps and the command that does the same."""
    runs: dict[str, Any] = {}
    for name in names:
        runs |= {net.name: net for net in EXPERIMENTS[name].nets(scale)}
    lines = []
    for net in runs.values():
        for seed in scale.seeds:
            lines.append(f"{net.training_steps():>9,} steps  {net.name}, seed {seed}: {net.command(seed)}")
    total = len(scale.seeds) * sum(net.training_steps() for net in runs.values())
    return "\n".join([*lines, f"{total:>9,} steps in all"])


def document(experiment: Any, content: dict[str, Any]) -> str:
    """An experiment's Markdown: title, command, table, provenance."""
    parts = [
        f"# {experiment.TITLE}",
        f"    {content['command']}",
        experiment.render(content),
        provenance(content),
    ]
    return "\n\n".join(parts) + "\n"
