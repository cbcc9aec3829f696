"""The code of README and docs runs: a page's blocks from top to bottom, in a folder that looks like a checkout.

A comment on the line before a block says what is special:

    <!-- slow -->                            minutes long: pytest -m slow tests/docs
    <!-- with: --config.train.epochs=1 -->   flags that make a training short enough to test
    <!-- not run: REASON -->                 cannot run here

Python blocks of a page share one namespace. In blocks of commands `pip install` is left out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import mpisjax
from mpisjax.configuration.settings import SETTINGS
from tools import figures, pages, streams

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [p for p in PAGES if not {"notes", "results"} & set(p.relative_to(ROOT).parts)]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
COMMAND = re.compile(r"(MPISJAX|JAX)_\w+=|(python3?|pip|mpisjax|pytest|mkdocs|nir|gcloud)\b")


class Block(NamedTuple):
    """A block of code."""

    code: str
    is_python: bool
    mark: str
    line: int

    @property
    def skipped(self) -> bool:
        return self.mark.startswith("not run: ")

    @property
    def slow(self) -> bool:
        return "slow" in self.mark.split(", ")


def blocks(page: Path) -> list[Block]:
    """The Python and the commands of a page."""
    text, found = page.read_text(), []
    for m in FENCE.finditer(text):
        code = re.sub(rf"^{m['indent']}", "", m["code"], flags=re.M)
        is_python = m["language"] == "python"
        if is_python or m["language"] in ("bash", "sh") or (not m["language"] and COMMAND.match(code)):
            found.append(Block(code, is_python, m["mark"] or "", text[: m.start("code")].count("\n") + 1))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block that are run, with the flags that its mark adds to trainings."""
    lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    extra = next((part[6:] for part in block.mark.split(", ") if part.startswith("with: ")), "")
    kept = [p for p in parts if p and not re.match(r"#|pip install|python3? -m venv|\. venv", p)]
    return [f"{p} {extra}" if re.search(r"train\.py|mpisjax train", p) else p for p in kept]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with everything of the repository but what runs leave behind; the current one."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "site", ".git"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: Block, page: Path, names: dict) -> None:
    if block.is_python:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands(block):
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, f"{page.name}:{block.line}: {command}\n{done.stdout}\n{done.stderr}"


CASES = [
    pytest.param(
        page,
        slow,
        id=str(page.relative_to(ROOT)) + (" slow" if slow else ""),
        marks=[pytest.mark.slow] if slow else [],
    )
    for page in PAGES
    for slow in (False, True)
    if any(b.slow == slow for b in blocks(page) if not b.skipped)
]


@pytest.mark.parametrize(("page", "slow"), CASES)
def test_the_blocks_of_a_page_run(page, slow, checkout):
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if not block.skipped and (slow or not block.slow):
            run(block, page, names)


@pytest.mark.unoptimized
def test_the_picture_of_the_streams_is_the_one_that_the_network_gives():
    assert streams.PICTURE.read_text() == streams.picture(), "run python -m tools.streams"


def test_plots_of_numbers_on_the_pages_have_points():
    for draw in (figures.accuracy, figures.latency, figures.work, figures.memory):
        points = [len(line.get_xdata()) for line in draw().axes[0].lines]
        assert len(points) > 1 and min(points) >= 3, draw


def test_what_is_not_run_has_a_reason():
    for page in PAGES:
        for block in blocks(page):
            for part in block.mark.split(", ") if block.mark and not block.skipped else []:
                assert part == "slow" or part.startswith("with: "), (page, block.line, part)
            assert not block.skipped or len(block.mark) > len("not run: ") + 10, (page, block.line)


def test_every_public_name_has_an_entry_in_the_reference():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: mpisjax\.(?:\w+\.)*(\w+)$", text, re.M)) | set(
        re.findall(r"<!-- api: mpisjax\.(\w+) -->", text)
    )
    assert set(mpisjax.__all__) <= named, set(mpisjax.__all__) - named


def test_a_help_text_becomes_prose_code_and_tables(monkeypatch):
    said = """usage: it [-h] [--out OUT]
          FILE

Reads `a --b` <well>, or
--out=DIR.

    it x    # one

options:
  --out OUT   where to,
              below --in
  --a_long_flag_of_this A
              its meaning"""
    monkeypatch.setenv("COLUMNS", "")  # restored afterwards, as is the next
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(pages.runpy, "run_module", lambda *_, **__: print(said))
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert pages.program_help("python -m it") == (
        "```text\nusage: it [-h] [--out OUT] FILE\n```\n\nReads `a --b` &lt;well&gt;, or `--out=DIR`.\n\n"
        "```text\nit x    # one\n```\n\n| options | |\n| --- | --- |\n| `--out OUT` | where to, below `--in` |\n"
        "| `--a_long_flag_of_this A` | its meaning |"
    )


def test_settings_that_pages_name_are_there():
    named = {
        (page.name, key)
        for page in PAGES
        for key in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)=", page.read_text())
    }
    assert len(named) > 20
    assert not [(page, key) for page, key in named if key not in SETTINGS and key != "KEY"]


def test_a_task_takes_at_most_ten_lines():
    text = (ROOT / "docs" / "howto" / "index.md").read_text()
    tasks = {task.split("\n", 1)[0]: task for task in text.split("\n## ")[1:]}
    assert len(tasks) >= 15
    for name, task in tasks.items():
        code = [line for m in FENCE.finditer(task) for line in m["code"].splitlines() if line.strip()]
        assert len(code) <= 10, (name, len(code))
