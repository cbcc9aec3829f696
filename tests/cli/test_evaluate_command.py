"""`mpisjax evaluate` and `mpisjax report`: tables for the eye, JSON and CSV when they are asked for."""

from __future__ import annotations

import csv
import json

import pytest

import mpisjax
from mpisjax.cli import evaluate, report
from mpisjax.errors import UserError

pytestmark = pytest.mark.unoptimized


def run(command, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([*map(str, arguments)])
    assert ended.value.code in (0, None)


def test_tables_are_printed_and_files_written_when_asked(tmp_path, capsys):
    out, folder = tmp_path / "out.json", tmp_path / "tables"
    run(evaluate, "--pretrained=digits", f"--json={out}", f"--csv={folder}", "--num_steps=2")
    said = capsys.readouterr().out
    card = mpisjax.load_pretrained("digits").card
    assert "accuracy, equivalent path" in said and "{" not in said
    assert "early exit at a confidence of 0." in said and "most often taken for" in said
    found = json.loads(out.read_text())
    assert found["pretrained"] == "digits" and found["num_examples"] == 360
    assert found["accuracy"] == pytest.approx(card["test"]["accuracy"], abs=1.5 / 360)
    wrong = found["misclassified"]
    assert len(wrong) == round(360 * (1 - found["accuracy"]))
    assert sum(map(sum, found["confusion"])) == 360
    assert sum(row[n] for n, row in enumerate(found["confusion"])) == 360 - len(wrong)
    exit_ = found["early_exit"]
    assert exit_["mean_steps"] < 8 and exit_["synops"] < exit_["full_synops"] / 2
    assert exit_["accuracy"] >= exit_["full_accuracy"] - 0.01 and found["by_steps"][0]["num_steps"] == 2
    assert {path.name for path in folder.iterdir()} == {"classes.csv", "confusion.csv", "misclassified.csv"}
    with open(folder / "misclassified.csv", newline="") as file:
        assert [int(row["example"]) for row in csv.DictReader(file)] == [one["example"] for one in wrong]


def test_a_saved_network_is_measured_and_json_on_standard_output_comes_alone(tmp_path, capsys):
    path = mpisjax.load_pretrained("digits").save(tmp_path / "mine")
    run(evaluate, f"--workdir={path}", "--json=-", "--no_early_exit", "--split=validation")
    found = json.loads(capsys.readouterr().out)
    assert found["workdir"] == str(path)
    assert found["split"] == "validation" and found["num_examples"] == 180 and "early_exit" not in found


def test_a_report_shows_what_is_wrong(tmp_path, capsys):
    run(report, "--pretrained=digits", f"--out={tmp_path / 'page.html'}", "--num_steps=2")
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Misclassified examples</h2>" in page and 'alt="misclassified examples"' in page
    assert f"written: {tmp_path / 'page.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "code", "sentence"),
    [
        (evaluate, ["--pretrained=digits", "--json=none/a.json"], 1, "--json none/a.json lies in no folder"),
        (
            evaluate,
            ["--pretrained=digits", "--config=digits"],
            1,
            "this command takes the config from --workdir",
        ),
        (evaluate, ["--workdir=a", "--pretrained=digits"], 2, "--pretrained: not allowed with argument --workdir"),
        (evaluate, ["--workdir=runs/none"], 1, "runs/none holds no checkpoint"),
        (report, ["--pretrained=digits"], 2, "the following arguments are required: --out"),
        (report, ["--pretrained=digits", "--out=none/a.html"], 1, "--out none/a.html lies in no folder"),
    ],
)
def test_a_mistake_is_one_sentence(command, arguments, code, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == code and said.err.startswith(f"error: {sentence}") and not said.out


def test_a_module_that_only_the_run_names_is_imported_when_it_is_trusted(monkeypatch, tmp_path, capsys):
    from mpisjax import configuration
    from mpisjax.configuration import rules
    from mpisjax.training import run as training

    config, asked = configuration.base(), []
    config.model.name = "theirs:network"

    def saved(workdir, trusted):
        asked.append(trusted)
        rules.check_trusted(config, str(workdir), trusted)
        raise UserError("it would be imported")

    monkeypatch.setattr(training, "saved_config", saved)
    workdir = f"--workdir={tmp_path}"
    for flags, words in (
        ([], "names 'theirs:network' as its model.name, and the code of that module would run"),
        (["--config.model.name=mine:network"], "names 'theirs:network'"),
        (["--config.model.name=theirs:network"], "it would be imported"),
        (["--trust"], "it would be imported"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate.main([workdir, *flags])
        assert ended.value.code == 1 and words in capsys.readouterr().err
    assert asked[0] == [] and asked[-1] is True
