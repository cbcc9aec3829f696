"""The scripts that docs/usage.md shows: each runs and learns."""

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unoptimized

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    "name, least",
    [
        ("raw_jax", 0.8),
        pytest.param("flax_module", 0.8, marks=pytest.mark.slow),
        pytest.param("equinox_module", 0.8, marks=pytest.mark.slow),
    ],
)
def test_script_learns_the_digits(name, least, capsys):
    if name == "equinox_module":
        pytest.importorskip("equinox", reason="Equinox is not installed: pip install equinox")
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.main(steps=60)
    assert found and min(found.values()) > least, found
    assert "accuracy" in capsys.readouterr().out


def test_every_script_is_tested_and_shown():
    shown = (FOLDER.parent / "docs" / "usage.md").read_text()
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == {"raw_jax", "flax_module", "equinox_module"}
    assert all(f"examples/{name}.py" in shown for name in scripts)


def test_code_shown_is_the_scripts_code():
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER.parent / "docs" / "usage.md").read_text(), re.DOTALL)
    scripts = [path.read_text() for path in FOLDER.glob("*.py")]
    definitions = [
        part for block in blocks for part in re.split(r"\n\n\n", block.strip()) if "adjoint_probe" not in part
    ]
    assert len(definitions) == 6
    for part in definitions:
        assert any(part in script for script in scripts), part
