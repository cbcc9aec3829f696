"""Results as JSON, as Markdown tables and as plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TITLES = {
    "peaks": "What the machine can do",
    "steps": "Training steps and inference",
    "memory": "Compiled memory a device",
    "adjoint": "An adjoint iteration beside an evaluation of f, in loops",
    "scaling": "Cost against size, devices and cores (rates, 4 + 4 iterations)",
    "solvers": "Solver steps",
    "profile": "Where the time goes (milliseconds a device)",
    "loader": "The data loader",
    "agreement": "Firing rates, ours against the peer's (float64)",
    "peer": "A whole F64C5 training step, ours beside the PyTorch peer",
    "targets": "Targets",
}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; columns in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, and what was measured; rows only for what this run measured."""
    rows: list[dict[str, Any]] = []

    def add(what: str, target: str, value: float, met: bool) -> None:
        rows.append({"what": what, "target": target, "measured": value, "met": "yes" if met else "no"})

    peer = results.get("peer", [])
    ours = {r["forward"]: r["seconds"] for r in peer if r["who"] == "mpisjax"}
    theirs = {r["forward"]: r["seconds"] for r in peer if r["backward"] == "Broyden as IDE-FSNN"}
    for steps, least in ((30, 2.5), (100, 2.0)):
        if steps in ours and steps in theirs:
            speed = theirs[steps] / ours[steps]
            add(f"F64C5, T = {steps}: times faster than the peer", f">= {least}", speed, speed >= least)
    if "rates" in ours and 30 in theirs:
        speed = theirs[30] / ours["rates"]
        add("F64C5, rates: times faster than the peer at T = 30", ">= 8", speed, speed >= 8)
    for row in results.get("steps", []):
        if row["what"] == "training step" and row["forward"] in (30, "rates"):
            title = f"{row['net']}, {row['forward']}: share of the convolution peak"
            add(title, ">= 0.7", row["of_peak"], row["of_peak"] >= 0.7)
        if row["net"].startswith("Fashion") and row["what"] == "training step" and row["forward"] == "rates":
            epoch = 468 * row["seconds"]
            add("Fashion-MNIST epoch (468 steps), rates: seconds", "<= 100", epoch, epoch <= 100)
    for net in dict.fromkeys(r["net"] for r in results.get("memory", [])):
        sizes = [r["temporary_MiB"] for r in results["memory"] if r["net"] == net and r["forward"] != "rates"]
        spread = max(sizes) / min(sizes) - 1
        add(f"{net}: growth of temporary memory over all T", "<= 0.02", spread, spread <= 0.02)
    for row in results.get("adjoint", []):
        add(f"{row['net']}: adjoint iteration / evaluation of f", "<= 3", row["ratio"], row["ratio"] <= 3)
    for row in results.get("agreement", []):
        difference = row["largest difference"]
        add(f"rates equal the peer's, {row['mode']}", "<= 1e-4", difference, difference <= 1e-4)
    return rows


def section(value: Any) -> str:
    """A section's rows as a table, or as several under their names."""
    if isinstance(value, dict):
        return "\n\n".join(f"### {name}\n\n{table(rows)}" for name, rows in value.items())
    return table(value)


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# Benchmarks", "", table([results["machine"]])]
    for key, title in TITLES.items():
        value = results.get(key)
        if not value:
            continue
        lines += ["", f"## {title}", "", section(value)]
    return "\n".join(lines).rstrip() + "\n"


def _lines(results: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)

    def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in rows if isinstance(r["forward"], int)]

    if steps := results.get("steps"):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for net in dict.fromkeys(r["net"] for r in steps):
            for what in ("training step", "inference"):
                rows = [r for r in steps if r["net"] == net and r["what"] == what]
                xs = [r["forward"] for r in numbered(rows)]
                (line,) = axes[0].loglog(
                    xs, [r["seconds"] for r in numbered(rows)], "o-", label=f"{net}, {what}"
                )
                axes[1].semilogx(xs, [r["of_peak"] for r in numbered(rows)], "o-", color=line.get_color())
                for r in rows:
                    if r["forward"] == "rates":
                        axes[0].axhline(r["seconds"], color=line.get_color(), ls=":", lw=1)
                        axes[1].axhline(r["of_peak"], color=line.get_color(), ls=":", lw=1)
        axes[0].set(xlabel="time steps T (dotted: rates)", ylabel="seconds")
        axes[1].set(
            xlabel="time steps T (dotted: rates)", ylabel="share of the convolution peak", ylim=(0, None)
        )
        axes[0].legend(fontsize=7)
        save(figure, "steps.png")
    if memory := results.get("memory"):
        figure, axis = plt.subplots(figsize=(5, 4))
        for net in dict.fromkeys(r["net"] for r in memory):
            rows = numbered([r for r in memory if r["net"] == net])
            axis.semilogx([r["forward"] for r in rows], [r["temporary_MiB"] for r in rows], "o-", label=net)
        axis.set(xlabel="time steps T", ylabel="temporary memory of a training step, MiB", ylim=(0, None))
        axis.legend()
        save(figure, "memory.png")
    if scaling := results.get("scaling"):
        names = list(dict.fromkeys(r["axis"] for r in scaling))
        figure, axes = plt.subplots(1, len(names), figsize=(3.5 * len(names), 3.5), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for net in dict.fromkeys(r["net"] for r in scaling if r["axis"] == name):
                rows = [r for r in scaling if r["axis"] == name and r["net"] == net]
                axis.plot([r["value"] for r in rows], [r["seconds"] for r in rows], "o-", label=net)
            highest = max(r["seconds"] for r in scaling if r["axis"] == name)
            axis.set(xlabel=name, ylabel="seconds a step", ylim=(0, 1.08 * highest))
            if not any(isinstance(r["value"], str) for r in scaling if r["axis"] == name):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize=7)
        save(figure, "scaling.png")
    if peer := results.get("peer"):
        figure, axis = plt.subplots(figsize=(7, 4))
        labels = [
            f"{r['who']}, {'rates' if r['forward'] == 'rates' else 'T = ' + str(r['forward'])}\n{r['backward']}"
            for r in peer
        ]
        colours = ["tab:blue" if r["who"] == "mpisjax" else "tab:orange" for r in peer]
        axis.barh(labels, [r["seconds"] for r in peer], color=colours)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set(xlabel="seconds a training step (F64C5, batch 64)")
        save(figure, "peer.png")
    if profile := results.get("profile"):
        kinds = ("arithmetic", "other", "copy", "all-reduce")
        figure, axis = plt.subplots(figsize=(7, 3.5))
        left = [0.0] * len(profile)
        for kind in kinds:
            width = [
                sum(r["ms"] for r in rows if r["operation"] == f"all: {kind}") for rows in profile.values()
            ]
            total = [
                sum(r["ms"] for r in rows if r["operation"].startswith("all: ")) for rows in profile.values()
            ]
            width = [w / t if t else 0.0 for w, t in zip(width, total, strict=True)]
            axis.barh(list(profile), width, left=left, label=kind)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.set(xlabel="share of a training step's time", xlim=(0, 1))
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds), frameon=False)
        save(figure, "profile.png")


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json, results.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    results["targets"] = targets(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    _lines(results, folder)
