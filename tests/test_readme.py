"""README's program runs, and the table of ideas in ARCHITECTURE names what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLE = (ROOT / "ARCHITECTURE.md").read_text().partition("## Where each idea is")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| ([^|]+) \| ((?:`\w[\w., `]*` in )?`[\w/]+\.py`) \|$", TABLE, re.MULTILINE)


def test_the_program_prints_the_shape_of_a_gradient(capsys):
    exec(compile(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], "README.md", "exec"), {})
    assert capsys.readouterr().out == "(5, 16)\n"


def test_the_table_is_read():
    assert len(ROWS) >= 11


@pytest.mark.parametrize(("what", "where"), ROWS, ids=[what for what, _ in ROWS])
def test_what_you_look_for_is_where_the_table_says(what, where):
    *names, path = re.findall(r"`([^`]+)`", where)
    text = (ROOT / path).read_text()
    for name in names:
        assert re.search(rf"^\s*(def|class) {name.rpartition('.')[2]}\b", text, re.MULTILINE), name
