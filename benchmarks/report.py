"""Results as JSON, as Markdown tables and as plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpisjax.analysis.figures import new_figure

TITLES = {
    "peaks": "What the machine can do",
    "gpu_peaks": "What the GPU can do",
    "gpu": "Training steps on the GPU",
    "steps": "Training steps and inference",
    "memory": "Compiled memory a device",
    "adjoint": "An adjoint iteration beside an evaluation of f, in loops",
    "scaling": "Cost against size, devices and cores (rates, 4 + 4 iterations)",
    "solvers": "Solver steps",
    "profile": "Where the time goes (milliseconds a device)",
    "loader": "The data loader",
    "startup": "Until something happens",
    "footprint": "Peak resident memory by phase, MiB",
    "accuracy": "Until a network is good",
    "inference": "An answer of a packaged network",
    "agreement": "Firing rates, ours against the peer's (float64)",
    "peer": "A whole F64C5 training step, ours beside the PyTorch peer",
    "race": "Fashion-MNIST, 16C3-32C3-48C3s2-FC10, until 90% of the validation split, ours beside libraries",
    "libraries": "A whole training step of 16C3-32C3-48C3s2-FC10, ours beside libraries",
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
    """Targets beside measured values; a row for each target that this run measured."""
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
    rows += _targets_beside_libraries(results.get("libraries", []))
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


def _targets_beside_libraries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of a comparison with libraries: against snnTorch, and against the best of all."""
    theirs = [r for r in rows if not r["who"].startswith("mpisjax")]
    found = []
    for what, steps, column, least, who in (
        ("T = 30: snnTorch's time / ours by rates, 4 + 4 solver steps", 30, "time / rates, 4 + 4", 25, "snnTorch"),
        ("T = 30: snnTorch's time / ours by rates, 3 + 1 solver steps", 30, "time / rates, 3 + 1", 25, "snnTorch"),
        ("T = 30: snnTorch's time / ours by spikes", 30, "time / spikes", 8, "snnTorch"),
        ("T = 4: the fastest library's time / ours through time", 4, "time / through time", 2, ""),
        ("T = 30: the leanest library's memory / ours by spikes", 30, "memory / spikes", 10, ""),
    ):
        if values := [r[column] for r in theirs if r["T"] == steps and r["who"].startswith(who)]:
            best = min(values)
            target, met = f">= {least}", "yes" if best >= least else "no"
            found.append({"what": what, "target": target, "measured": best, "met": met})
    return found


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


def _with_steps(rows: list[dict[str, Any]], **chosen: Any) -> list[dict[str, Any]]:
    """Rows that have the chosen values and a number of time steps."""
    return [r for r in rows if isinstance(r["forward"], int) and all(r[k] == v for k, v in chosen.items())]


def _plot_steps(rows: list[dict[str, Any]]) -> Figure:
    figure = new_figure(10, 4)
    times, shares = figure.subplots(1, 2)
    for net, what in dict.fromkeys((r["net"], r["what"]) for r in rows):
        over_time = _with_steps(rows, net=net, what=what)
        xs = [r["forward"] for r in over_time]
        (line,) = times.loglog(xs, [r["seconds"] for r in over_time], "o-", label=f"{net}, {what}")
        shares.semilogx(xs, [r["of_peak"] for r in over_time], "o-", color=line.get_color())
        for r in rows:
            if (r["net"], r["what"], r["forward"]) == (net, what, "rates"):
                times.axhline(r["seconds"], color=line.get_color(), ls=":", lw=1)
                shares.axhline(r["of_peak"], color=line.get_color(), ls=":", lw=1)
    x = "time steps T (dotted: rates)"
    times.set(xlabel=x, ylabel="seconds")
    shares.set(xlabel=x, ylabel="share of the convolution peak", ylim=(0, None))
    times.legend(fontsize=7)
    return figure


def _plot_memory(rows: list[dict[str, Any]]) -> Figure:
    figure = new_figure(5, 4)
    axis = figure.subplots()
    for net in dict.fromkeys(r["net"] for r in rows):
        over_time = _with_steps(rows, net=net)
        axis.semilogx([r["forward"] for r in over_time], [r["temporary_MiB"] for r in over_time], "o-", label=net)
    axis.set(xlabel="time steps T", ylabel="temporary memory of a training step, MiB", ylim=(0, None))
    axis.legend()
    return figure


def _plot_scaling(rows: list[dict[str, Any]]) -> Figure:
    names = list(dict.fromkeys(r["axis"] for r in rows))
    figure = new_figure(3.5 * len(names), 3.5)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        shown = [r for r in rows if r["axis"] == name]
        for net in dict.fromkeys(r["net"] for r in shown):
            points = [(r["value"], r["seconds"]) for r in shown if r["net"] == net]
            axis.plot(*zip(*points, strict=True), "o-", label=net)
        axis.set(xlabel=name, ylabel="seconds a step", ylim=(0, 1.08 * max(r["seconds"] for r in shown)))
        if not any(isinstance(r["value"], str) for r in shown):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7)
    return figure


def _plot_peer(rows: list[dict[str, Any]]) -> Figure:
    figure = new_figure(7, 4)
    axis = figure.subplots()
    forwards = ["rates" if r["forward"] == "rates" else f"T = {r['forward']}" for r in rows]
    labels = [f"{r['who']}, {forward}\n{r['backward']}" for r, forward in zip(rows, forwards, strict=True)]
    colors = ["tab:blue" if r["who"] == "mpisjax" else "tab:orange" for r in rows]
    axis.barh(labels, [r["seconds"] for r in rows], color=colors)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlabel="seconds a training step (F64C5, batch 64)")
    return figure


def _plot_profile(profile: dict[str, list[dict[str, Any]]]) -> Figure:
    kinds = ("arithmetic", "other", "copy", "all-reduce")
    figure = new_figure(7, 3.5)
    axis = figure.subplots()
    ms = {
        title: [sum(r["ms"] for r in rows if r["operation"] == f"all: {kind}") for kind in kinds]
        for title, rows in profile.items()
    }
    left = [0.0] * len(profile)
    for number, kind in enumerate(kinds):
        width = [of_title[number] / (sum(of_title) or 1.0) for of_title in ms.values()]
        axis.barh(list(profile), width, left=left, label=kind)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set(xlabel="share of a training step's time", xlim=(0, 1))
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds), frameon=False)
    return figure


PLOTS: dict[str, Callable[[Any], Figure]] = {
    "steps": _plot_steps,
    "memory": _plot_memory,
    "scaling": _plot_scaling,
    "peer": _plot_peer,
    "profile": _plot_profile,
}


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json, results.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    results["targets"] = targets(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    for name, plot in PLOTS.items():
        if rows := results.get(name):
            plot(rows).savefig(folder / f"{name}.png")
