"""Imports point one way: a module imports only what stands above it in LAYERS, and nothing goes in a circle."""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = [
    "equilibrium",
    "neurons",
    "firing",
    "simulate",
    "solvers",
    "samples",
    "meshes",
    "hoisting",
    "jacobian",
    "residuals",
    "errors",
]
LAYERS = [
    [
        "launch",
        "mpisjax.arguments",
        "mpisjax.paths",
        "mpisjax.settings",
        *(f"mpisjax.{name}" for name in CORE),
    ],
    ["mpisjax.cpu"],
    ["mpisjax.nn", "mpisjax.weights"],
    ["mpisjax.baselines", "mpisjax.data", "mpisjax.training"],
    ["mpisjax.configuration", "mpisjax.training.run"],  # where settings become objects
    ["mpisjax.analysis", "mpisjax.pretrained", "mpisjax.export"],
    [
        "mpisjax",
        "mpisjax.cli",
        "mpisjax.config_files",
        "mpisjax.pretrained.__main__",
        "mpisjax.export.__main__",
    ],
    ["benchmarks", "experiments", "examples", "train", "evaluate", "demo"],
]
PACKAGES = {0: {"jax", "jaxopt", "jaxtyping", "numpy"}, 1: {"jax", "numpy"}}  # by layer, beside Python's own
EXCEPTIONS = {
    ("mpisjax.training.evaluation", "mpisjax.configuration"),
    ("mpisjax.training.init_from", "mpisjax.configuration"),
    ("mpisjax.training.step", "mpisjax.configuration"),
}  # importer, imported: to be removed one by one
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


def place(module: str) -> tuple[int, str]:
    """The layer of a module, and the most specific entry of LAYERS that it belongs to."""
    entries = [(entry, n) for n, layer in enumerate(LAYERS) for entry in layer]
    entry, n = max(e for e in entries if f"{module}.".startswith(f"{e[0]}."))
    return n, entry


EDGES = {(a, b) for a in MODULES for b in imported(a) if b in MODULES} - EXCEPTIONS


def test_layers_import_only_what_is_below_them():
    assert not [(a, b) for a, b in EDGES if place(b)[0] > place(a)[0] or b.endswith(".__main__")]
    assert not [e for e in EXCEPTIONS if e[1] not in imported(e[0])]  # no exception outlives its reason


def test_no_import_goes_in_a_circle():
    folders = {(place(a)[1], place(b)[1]) for a, b in EDGES}
    for edges in (EDGES, {(a, b) for a, b in folders if a != b}):
        graph: dict[str, set[str]] = {}
        for a, b in edges:
            graph.setdefault(a, set()).add(b)
        graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_core_and_the_convolutions_need_jax_alone():
    for module in MODULES:
        if (allowed := PACKAGES.get(place(module)[0])) is not None:
            others = {name for name in imported(module) if name not in MODULES}
            allowed = allowed | ({"platformdirs"} if module == "mpisjax.paths" else set())
            assert others <= allowed | set(sys.stdlib_module_names) | {"mpisjax"}, module
