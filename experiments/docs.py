"""The generated tables of the documentation, written from the JSON files in docs/results.

In a page, the table of docs/results/smoke/table1.json stands between `<!-- generated: smoke/table1 -->` and
`<!-- end of generated -->`. If that file is missing, the page says that the experiment was not run, and gives
its command. The sections of `python -m benchmarks`, such as `<!-- generated: benchmarks/steps -->`, come from
docs/results/benchmarks.json.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks import report
from experiments.catalog import EXPERIMENTS, plan
from experiments.nets import ROOT
from experiments.scales import NAMES, scale_of
from experiments.tables import provenance
from mpisjax.errors import UserError

DOCS = ROOT / "docs"
# The columns of a section of the benchmarks that its page shows, with their headings. Other sections are shown whole.
COLUMNS: dict[str, dict[str, str]] = {
    "peer": {
        "who": "who",
        "forward": "T or rates",
        "backward": "backward",
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "adjoint_steps": "adjoint steps",
    },
    "steps": {
        "net": "network",
        "what": "what",
        "forward": "T or rates",
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "GFLOP/s": "GFLOP/s",
        "of_peak": "share of the peak",
        "compile_seconds": "seconds to compile",
        "temporary_MiB": "memory, MiB",
    },
    "memory": {"net": "network", "forward": "T or rates", "solver": "solver", "temporary_MiB": "memory, MiB"},
    "footprint": {
        "config": "config",
        "what": "what",
        "parameters": "parameters",
        "batch": "batch",
        "temporary_MiB": "XLA's temporaries",
        "import": "import",
        "data": "data",
        "compile": "compile",
        "steps": "steps",
        "validation": "validation",
        "peak_MiB": "peak",
    },
    "adjoint": {
        "net": "network",
        "forward_seconds": "evaluation of f, seconds",
        "adjoint_seconds": "adjoint iteration, seconds",
        "ratio": "ratio",
    },
    "scaling": {
        "axis": "what changes",
        "net": "network",
        "value": "value",
        "seconds": "seconds",
        "ms_a_sample": "ms a sample",
        "GFLOP/s": "GFLOP/s",
    },
    "solvers": {
        "net": "network",
        "solver": "solver",
        "tolerance": "tolerance",
        "forward_steps": "forward steps",
        "forward_residual": "forward residual",
        "adjoint_steps": "adjoint steps",
        "adjoint_residual": "adjoint residual",
    },
}
BLOCK = re.compile(
    r"(?P<start><!-- generated: (?P<scale>\w+)/(?P<name>\w+) -->\n).*?(?P<end><!-- end of generated -->)",
    re.DOTALL,
)


def pages(root: Path = ROOT) -> list[Path]:
    """Every file that may hold generated tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def generated(scale: str, name: str, docs: Path = DOCS) -> str:
    """The text between the marks of a block: table, figures, provenance and command."""
    if scale == "benchmarks":
        return benchmark(name, docs)
    if scale not in NAMES or name not in EXPERIMENTS:
        raise UserError(f"a page has the mark 'generated: {scale}/{name}', which names no scale and experiment.")
    experiment = EXPERIMENTS[name]
    source = docs / "results" / scale / f"{name}.json"
    if not source.is_file():
        steps = plan((name,), scale_of(scale)).splitlines()[-1].split(" steps")[0].strip()
        flags = "" if scale == "smoke" else " --data_dir DIR"
        command = f"`python -m experiments {name} --scale {scale}{flags}`"
        return f"Not run here. Command: {command} ({steps} training steps).\n"

    content = json.loads(source.read_text())
    drawn = sorted(source.parent.glob(f"{name}_*.svg"))
    names = [f" ({image.stem.partition('_')[2].replace('_', ' ')})" if len(drawn) > 1 else "" for image in drawn]
    images = "\n".join(
        f"![{experiment.TITLE}{which}](results/{scale}/{image.name})\n"
        for image, which in zip(drawn, names, strict=True)
    )
    if len(drawn) > 1:
        images = f'<div class="side" markdown>\n\n{images}\n</div>\n'
    return f"{experiment.render(content)}\n\n{images}\n{provenance(content)} Command: `{content['command']}`\n"


def benchmark(name: str, docs: Path = DOCS) -> str:
    """The text between the marks of a section of `python -m benchmarks`."""
    content = json.loads((docs / "results" / "benchmarks.json").read_text())
    if name not in content:
        raise UserError(f"a page has the mark 'generated: benchmarks/{name}', which was not measured.")
    if name == "machine":
        return f"{report.table([content[name]])}\n"
    run = content.get("other_runs", {}).get(name)
    about = f"\nOf another run:\n\n{report.table([run])}\n" if run else ""
    shown = COLUMNS.get(name)
    rows = content[name]
    if shown is not None:
        rows = [{title: row.get(key, "") for key, title in shown.items()} for row in rows]
    return f"{report.section(rows)}\n{about}"


def joined(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Joins the results of a benchmark run with those that are kept.

    The main run is the one that measured the training steps. A section of another run keeps that run's
    machine.
    """
    sections = [k for k in report.TITLES if k != "targets"]
    runs = {k: kept.get("other_runs", {}).get(k, kept["machine"]) for k in sections if k in kept}
    runs |= {k: new["machine"] for k in sections if k in new}
    machine = new["machine"] if "steps" in new or not kept else kept["machine"]
    whole = {k: new.get(k, kept.get(k)) for k in runs}
    whole |= {"machine": machine, "other_runs": {k: run for k, run in runs.items() if run != machine}}
    return {**whole, "targets": report.targets(whole)}


def rewritten(text: str, docs: Path = DOCS) -> str:
    """The text of a page with all its blocks generated anew."""
    return BLOCK.sub(lambda m: f"{m['start']}\n{generated(m['scale'], m['name'], docs)}\n{m['end']}", text)


def take(out: Path, docs: Path = DOCS) -> list[str]:
    """Copies the results in an output folder into the documentation; returns the names of what it copied."""
    taken = []
    for source in sorted(out.glob("*/results.json")):
        content: dict[str, Any] = json.loads(source.read_text())
        folder = docs / "results" / content["scale"]
        folder.mkdir(parents=True, exist_ok=True)
        name = content["experiment"]
        (folder / f"{name}.json").write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n")
        for image in sorted(source.parent.glob("*.svg")):
            shutil.copyfile(image, folder / f"{name}_{image.name}")
        taken.append(f"{content['scale']}/{name}")
    if (out / "results.json").is_file():  # of the benchmarks
        target = docs / "results" / "benchmarks.json"
        kept = json.loads(target.read_text()) if target.is_file() else {}
        new = json.loads((out / "results.json").read_text())
        target.write_text(json.dumps(joined(kept, new), indent=1) + "\n")
        taken.append("benchmarks")
    if not taken:
        raise UserError(
            f"--take {out} holds no results.json, of an experiment or of benchmarks; run one with --out {out} first."
        )
    return taken


def main(out: Path | None, check: bool) -> None:
    """Writes every page anew; with `check`, changes nothing and refuses pages that are stale."""
    if out is not None:
        print(f"taken: {', '.join(take(out))}")
    stale = []
    for page in pages():
        text = page.read_text()
        if (new := rewritten(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    if check and stale:
        raise UserError(f"{', '.join(stale)} differ from what `python -m experiments docs` writes; run it.")
    print(f"{'rewritten: ' + ', '.join(stale) if stale else 'all tables are as generated'}")
