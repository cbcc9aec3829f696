"""Imports point one way: a module imports only what stands above it in LAYERS, and nothing goes in a circle."""

import graphlib
import sys

from tools.architecture import MODULES, PICTURE, imported, picture, place

PACKAGES = {0: {"jax", "jaxopt", "jaxtyping", "numpy"}, 1: {"jax", "numpy"}}  # by layer, beside Python's own
EXCEPTIONS: set[tuple[str, str]] = set()  # importer, imported: to be removed one by one
EDGES = {(a, b) for a in MODULES for b in imported(a) if b in MODULES} - EXCEPTIONS


def test_layers_import_only_what_is_below_them():
    assert not [(a, b) for a, b in EDGES if place(b)[0] > place(a)[0] or b.endswith(".__main__")]
    assert not [e for e in EXCEPTIONS if e[1] not in imported(e[0])]  # no exception outlives its reason


def test_no_import_goes_in_a_circle():
    folders = {(place(a)[2], place(b)[2]) for a, b in EDGES}
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


def test_the_picture_in_docs_is_the_one_that_the_code_gives():
    assert PICTURE.read_text() == picture(), "run python -m tools.architecture"


def test_importing_mpisjax_is_quick_and_leaves_no_trace(python, tmp_path):
    """What is slow to import waits until it is used, nothing is compiled, and the cache is not touched."""
    done = python(
        "-c",
        "import sys, mpisjax; print(*{m.partition('.')[0] for m in sys.modules})",
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"jaxopt", "flax", "optax", "orbax", "scipy", "tensorflow", "torch"}
    assert not list(tmp_path.iterdir())
