"""Which part imports which: the layers, and a picture of them that is drawn from the code.

python -m tools.architecture            # writes docs/architecture.svg
"""

from __future__ import annotations

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
CORE = [
    "equilibrium",
    "implicit",
    "neurons",
    "firing",
    "simulate",
    "solvers",
    "meshes",
    "hoisting",
    "jacobian",
    "residuals",
    "errors",
]
# From the bottom up. A module imports from its own layer and from those below it. In a layer: the boxes of the picture,
# and the modules and packages that each holds.
LAYERS: list[dict[str, list[str]]] = [
    {
        "core": [f"mpisjax.{name}" for name in CORE],
        "helpers": ["mpisjax.paths"],
    },
    {"cpu": ["mpisjax.cpu"]},
    {"nn": ["mpisjax.nn", "mpisjax.weights"]},
    {
        "baselines": ["mpisjax.baselines"],
        "data": ["mpisjax.data"],
        "training": ["mpisjax.training"],
        "storage": ["mpisjax.storage"],
    },
    {"settings to objects": ["mpisjax.configuration", "mpisjax.training.run", "mpisjax.training.init_from"]},
    {"analysis": ["mpisjax.analysis"], "pretrained": ["mpisjax.pretrained"], "export": ["mpisjax.export"]},
    {
        "public names": ["mpisjax"],
        "command line": [
            "mpisjax.cli",
            "mpisjax.__main__",
            "mpisjax_launch",
            "mpisjax.pretrained.__main__",
            "mpisjax.export.__main__",
        ],
    },
    {
        "examples": ["examples"],
        "programs": ["train", "evaluate", "predict", "demo", "setup"],
        "benchmarks": ["benchmarks"],
        "experiments": ["experiments"],
    },
]
FOLDERS = ("mpisjax", "benchmarks", "experiments", "examples")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PATHS}


def imported(module: str) -> set[str]:
    """Everything that a module imports, inside functions too: our modules, and others' packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in inside.values()}
    return {name if name in MODULES else name.partition(".")[0] for name in names}


def place(module: str) -> tuple[int, str, str]:
    """The layer of a module, its box, and the most specific entry of LAYERS that it belongs to."""
    entries = [(entry, n, box) for n, layer in enumerate(LAYERS) for box, held in layer.items() for entry in held]
    entry, n, box = max(e for e in entries if f"{module}.".startswith(f"{e[0]}."))
    return n, box, entry


def box_edges() -> set[tuple[str, str]]:
    """(importer, imported): which box imports from which other one that stands below it."""
    pairs = {(place(a), place(b)) for a in MODULES for b in imported(a) if b in MODULES}
    return {(a[1], b[1]) for a, b in pairs if a[1] != b[1] and b[0] <= a[0]}


def without_implied(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that no path of others stands for."""

    def reached(start: str, avoid: tuple[str, str]) -> set[str]:
        found: set[str] = set()
        todo = [start]
        while todo:
            here = todo.pop()
            new = {b for a, b in edges if a == here and (a, b) != avoid} - found
            found |= new
            todo += new
        return found

    return {edge for edge in edges if edge[1] not in reached(edge[0], edge)}


def picture() -> str:
    """The picture, an SVG."""
    width, step, height = 960, 92, 52
    where: dict[str, tuple[float, float, float]] = {}
    boxes: list[str] = []
    for n, layer in enumerate(reversed(LAYERS)):
        room = width / len(layer)
        wide = min(room - 24, 220 if layer.keys() != LAYERS[0].keys() else room - 24)
        for k, (box, held) in enumerate(layer.items()):
            x, y = room * (k + 0.5), 12 + n * step
            x += 120 if box in ("cpu", "settings to objects") else 0  # out of the way of arrows that pass
            where[box] = x, y, wide
            names = [name.removeprefix("mpisjax.") for name in held if "__main__" not in name]
            inside = textwrap.wrap(", ".join(names), int(wide / 6)) if names != [box] else []
            boxes.append(
                f'<rect x="{x - wide / 2:.0f}" y="{y}" width="{wide:.0f}" height="{height}" rx="6"/>'
                f'<text x="{x:.0f}" y="{y + (31, 22, 17)[len(inside)]}" class="name">{escape(box)}</text>'
            )
            for m, line in enumerate(inside):
                below = y + (40, 32)[len(inside) - 1] + 13 * m
                boxes.append(f'<text x="{x:.0f}" y="{below}">{escape(line)}</text>')
    arrows = []
    for a, b in sorted(without_implied(box_edges())):
        (x1, y1, wide1), (x2, y2, wide2) = where[a], where[b]
        if y1 == y2:  # side by side
            way = 1 if x2 > x1 else -1
            middle = y1 + height / 2
            line = f"M{x1 + way * wide1 / 2:.0f} {middle:.0f} L{x2 - way * (wide2 / 2 + 2):.0f} {middle:.0f}"
        else:
            top, bend = y1 + height, (y2 - y1 - height) / 2
            line = f"M{x1:.0f} {top} C{x1:.0f} {top + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2 - 2}"
        arrows.append(f'<path d="{line}" marker-end="url(#tip)"><title>{escape(a)} imports {escape(b)}</title></path>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {12 + len(LAYERS) * step - 24}" '
            'font-family="sans-serif">',
            "<style>rect{fill:#eef3fa;stroke:#47678f}text{text-anchor:middle;font-size:11px;fill:#333}"
            ".name{font-size:14px;font-weight:bold}path{fill:none;stroke:#8a97a8;stroke-width:1.3}#tip "
            "path{fill:#8a97a8}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            *arrows,
            *boxes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
