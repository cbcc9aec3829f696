"""Every script of examples/ runs and learns."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.unoptimized

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
QUICK = ("raw_jax", "fit_attention", "fit_dense", "fit_nnx", "fit_shd")


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.slow]) for p in SCRIPTS]
)
def test_script_learns_the_digits(path, capsys, tmp_path):
    if path.stem == "equinox_module":
        pytest.importorskip("equinox", reason="Equinox is not installed: pip install equinox")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    fits = path.stem.startswith("fit_")
    found = script.main(tmp_path, epochs=6) if fits else script.main(steps=60)
    assert found and min(found.values()) > 0.8, found
    assert "accuracy" in capsys.readouterr().out
