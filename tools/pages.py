"""What MkDocs does to the pages beside Markdown: generated references, MathJax's file, tables that fit a phone.

mkdocs.yml names this file as a hook. In a page, `<!-- settings -->` stands for the tables of all settings, `<!--
commands -->` for what `mpisjax` can do, `<!-- help: PROGRAM -->` for what a program's --help says, `<!-- api: MODULE
-->` for the public names of a module, and `<!-- code: FILE NAME ... -->` for functions and classes of a file.
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import importlib.util
import io
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHORT = 40  # characters of code that are not broken within a sentence
MATHJAX = "es5/tex-svg.js"  # one file, fonts included
HEADINGS = {
    "": "The run",
    "data": "Data",
    "model": "The network",
    "neuron": "Neurons",
    "forward": "Forward",
    "adjoint": "Backward, implicit",
    "bptt": "Backward, through time",
    "train": "Training",
    "eval": "Evaluation",
    "devices": "Devices",
}
PREFIXES = {"spikes": "`forward.mode=spikes`", "rates": "`forward.mode=rates`", "event sets": "event sets"}
METHODS = {"adjoint": "`train.method=implicit`", "bptt": "`train.method=bptt`"}


def used_by(name: str, meaning: str) -> tuple[str, str]:
    """The mode that uses a setting (empty: all), and the meaning without the words that said so."""
    prefix, colon, rest = meaning.partition(": ")
    if colon and prefix in PREFIXES:
        return PREFIXES[prefix], rest
    return METHODS.get(name.partition(".")[0], ""), meaning


def settings_tables() -> str:
    """All settings, a table for each group: name, type, default, meaning, and the mode that uses it."""
    sys.path.insert(0, str(ROOT))
    from mpisjax.configuration.settings import SETTINGS, values

    groups: dict[str, list[str]] = {}
    for name, setting in SETTINGS.items():
        group = name.partition(".")[0] if "." in name else ""
        mode, meaning = used_by(name, setting.meaning)
        rules = f" ({phrase})" if (phrase := values(setting)) and phrase not in meaning else ""
        default = str(setting.default).replace(" ", "") or '""'
        kind = type(setting.default).__name__
        row = f"| `{name}` | {kind} | `{default}` | {meaning}{rules} | {mode or 'always'} |"
        groups.setdefault(group, []).append(row.replace("||", "\\|\\|"))
    header = "| setting | type | default | meaning | used by |\n| --- | --- | --- | --- | --- |"
    return "\n\n".join(
        "\n".join([f"## {HEADINGS.get(group, group)}", "", header, *rows]) for group, rows in groups.items()
    )


def program_help(program: str) -> str:
    """What `python -m MODULE ...` says to --help, as Markdown; without the settings, which have a page."""
    module, *rest = program.removeprefix("python -m ").split()
    said, before = io.StringIO(), sys.argv
    # Programs start anew for large pages where this is not set, which would end MkDocs.
    os.environ.update(COLUMNS="88", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *rest, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
    text = said.getvalue().partition("settings, with their defaults")[0].strip()
    return "\n\n".join(map(_as_markdown, text.split("\n\n")))


def _as_markdown(paragraph: str) -> str:
    """A paragraph of a help text: the usage or commands as code, a group of flags as a table, prose as prose."""
    first, *lines = paragraph.splitlines()
    if first.startswith("usage:"):
        return f"```text\n{' '.join(paragraph.split())}\n```"
    if first.startswith((" ", "python -m ")):
        return f"```text\n{textwrap.dedent(paragraph)}\n```"
    if not (first.endswith(":") and lines and lines[0].startswith("  ")):
        return _with_flags(" ".join([first, *lines]))
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("   "):  # goes on with the meaning of the flag above
            rows[-1][1] += f" {line.strip()}"
        else:
            flag, _, meaning = line.strip().partition("  ")
            rows.append([flag, meaning.strip()])
    cells = (f"| `{flag}` | {_with_flags(meaning.strip())} |" for flag, meaning in rows)
    return "\n".join([f"| {first.rstrip(':')} | |", "| --- | --- |", *cells])


def _with_flags(text: str) -> str:
    """Prose of a help text, its flags as code."""
    parts = text.split("`")  # every second one is code already
    parts[::2] = [re.sub(r"--[\w.]+(=\w+)?", r"`\g<0>`", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)


def command_help() -> str:
    """A section for every command of the program `mpisjax`."""
    sys.path.insert(0, str(ROOT))
    from mpisjax.cli.main import COMMANDS

    return "\n\n".join(
        f"## mpisjax {name}\n\n{what[:1].upper()}{what[1:]}.\n\n{program_help(f'python -m mpisjax {name}')}"
        for name, (_, what) in COMMANDS.items()
    )


def public_names(module: str) -> str:
    """A mkdocstrings mark for every public name of a module."""
    sys.path.insert(0, str(ROOT))
    names = importlib.import_module(module).__all__
    found = [name for name in names if not isinstance(getattr(importlib.import_module(module), name), type(sys))]
    # A function that is called as its file is found in there.
    places = (f"{name}.{name}" if importlib.util.find_spec(f"{module}.{name}") else name for name in found)
    return "\n\n".join(f"::: {module}.{place}" for place in places)


def source_of(file: str, names: list[str], indent: str) -> str:
    """Functions and classes of a file, as a block of code."""
    text = (ROOT / file).read_text()
    found = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    code = "\n\n\n".join(str(ast.get_source_segment(text, found[name])) for name in names)
    return "\n".join(f"{indent}{line}".rstrip() for line in ["```python", *code.splitlines(), "```"])


def breakable(code: re.Match[str]) -> str:
    """Code in a cell may break after a slash, an equals sign or a comma, and before a dot."""
    inside = code[0].removeprefix("<code>").removesuffix("</code>")
    return "<code>" + re.sub(r"(?<=[/=,])(?=\w)|(?<=\w)(?=\.[A-Za-z])", "<wbr>", inside) + "</code>"


def labelled(page: str) -> str:
    """Tables whose cells know their column's heading, so that a narrow page can show each row as a list."""

    def table(match: re.Match[str]) -> str:
        text = match[0]
        heads = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<th[^>]*>(.*?)</th>", text, re.DOTALL)]

        def row(found: re.Match[str]) -> str:
            titles = iter(heads)

            def cell(opening: re.Match[str]) -> str:
                title = html.unescape(next(titles, "")).replace('"', "'").replace("&", "&amp;").replace("<", "&lt;")
                return f'<td data-label="{title}"{opening[1]}>'

            return re.sub(r"<td([^>]*)>", cell, found[0])

        body = re.sub(r"<tr>.*?</tr>", row, text, flags=re.DOTALL)
        body = re.sub(r"<code>[^<]*</code>", breakable, body)
        return f'<div class="table columns-{min(len(heads), 12)}">{body}</div>'

    return re.sub(r"<table>.*?</table>", table, page, flags=re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Adds MathJax to the site's files."""
    from mkdocs.structure.files import File

    package = importlib.util.find_spec("mathjax")
    if package is None or package.origin is None:
        raise RuntimeError("MathJax is not installed: pip install '.[docs]'")
    source = Path(package.origin).parent / "static" / "mathjax" / MATHJAX
    files.append(File.generated(config, "javascripts/mathjax.js", abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts generated text where a page asks for it. Laboratory notes are not searched."""
    if page.file.src_uri.startswith(("notes/", "results/")):
        page.meta["search"] = {"exclude": True}
    markdown = markdown.replace("<!-- commands -->", command_help())
    markdown = re.sub(
        r"^( *)<!-- code: (\S+) ([^>]+?) -->",
        lambda m: source_of(m[2], m[3].split(), m[1]),
        markdown,
        flags=re.M,
    )
    markdown = re.sub(r"<!-- settings -->", lambda _: settings_tables(), markdown)
    markdown = re.sub(r"<!-- help: ([^>]+?) -->", lambda m: program_help(m[1]), markdown)
    return re.sub(r"<!-- api: ([\w.]+) -->", lambda m: public_names(m[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Labels the cells of tables, and marks what is to stay on one line: short code, and a flag's dashes and name."""

    def code(match: re.Match[str]) -> str:
        opening, inside = match.groups()
        if opening == "<code>" and len(re.sub(r"<[^>]+>|&\w+;", "", inside)) <= SHORT:
            opening = '<code class="short">'
        return opening + re.sub(r"(?<![^>\s\[])--\w+", r'<span class="flag">\g<0></span>', inside) + "</code>"

    return re.sub(r"(<code[^>]*>)(.*?)</code>", code, labelled(content), flags=re.DOTALL)
