"""The pages: built without a warning, and every table as its command writes it."""

import json
import os
import re
import subprocess
import sys

import pytest

from experiments import docs
from experiments.nets import ROOT


def test_no_table_was_edited_by_hand(capsys):
    docs.main(None, check=True)
    assert capsys.readouterr().out == "all tables are as generated\n"
    blocks = docs.BLOCK.findall((ROOT / "docs" / "reproduction.md").read_text())
    assert len(blocks) > 10


def test_an_edit_by_hand_is_found_and_undone():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    number = re.search(r"\| (\d+\.\d\d) \|", page)
    edited = page[: number.start(1)] + "99.99" + page[number.end(1) :]
    assert edited != page and docs.rewritten(edited) == page


def test_a_mark_that_names_nothing_is_refused():
    from mpisjax.errors import UserError

    with pytest.raises(UserError, match="smoke/table9"):
        docs.rewritten("<!-- generated: smoke/table9 -->\n<!-- end of generated -->")


def test_every_table_says_its_machine_seeds_date_and_command():
    for path in sorted((ROOT / "docs" / "results").glob("*/*.json")):
        content = json.loads(path.read_text())
        said = docs.generated(content["scale"], content["experiment"])
        assert f"`python -m experiments {content['experiment']} --scale {content['scale']}" in said
        assert (
            re.search(r"Scale `\w+`, (epochs: \d+( or \d+)*|nothing trained), seeds? [\d, ]+, \d{4}-\d\d-\d\d", said)
            and "cores" in said
        )


def test_what_was_not_run_has_its_command_and_its_steps(tmp_path):
    said = docs.generated("paper", "table1", tmp_path)
    assert said.startswith("Not run here. Command: `python -m experiments table1 --scale paper --data_dir DIR` (")


def test_benchmark_sections_of_several_runs_say_so(tmp_path):
    first = {"machine": {"date": "1st"}, "steps": [], "solvers": [{"solver": "a"}]}
    second = {"machine": {"date": "2nd"}, "solvers": [{"solver": "b"}], "scaling": [{"axis": "width"}]}
    kept = docs.joined({}, first)
    assert kept["other_runs"] == {} and kept["machine"] == first["machine"]
    both = docs.joined(kept, second)
    assert both["machine"] == first["machine"] and both["solvers"] == second["solvers"]
    assert both["other_runs"] == {"solvers": second["machine"], "scaling": second["machine"]}
    third = {"machine": {"date": "3rd"}, "steps": [], "solvers": [{"solver": "c"}]}
    last = docs.joined(both, third)
    assert last["machine"] == third["machine"] and last["solvers"] == third["solvers"]
    assert last["other_runs"] == {"scaling": second["machine"]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "benchmarks.json").write_text(json.dumps(last))
    assert "Of another run:" in docs.generated("benchmarks", "scaling", tmp_path)
    assert "Of another run:" not in docs.generated("benchmarks", "solvers", tmp_path)


def test_pages_are_built_without_a_warning(tmp_path):
    for package in ("material", "mkdocstrings", "mathjax"):
        pytest.importorskip(package, reason="what builds the pages is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # Material's own, on what comes after it
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "reproduction" / "index.html").is_file()
