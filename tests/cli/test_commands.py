"""The program `mpisjax`: its commands, a sweep over seeds, and configs by name."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpisjax.cli import main as program
from mpisjax.cli import train
from mpisjax.configuration import config_files
from mpisjax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_and_each_has_a_main(capsys):
    import importlib

    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for name, (module, what) in program.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", shown, re.MULTILINE)
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["trian"],
            2,
            "error: there is no command 'trian'; did you mean train?; --help lists the commands\n",
        ),
        (["train", "--sedes=1"], 2, "error: there is no flag --sedes; did you mean --seeds?"),
        (
            ["train", "--config=digit"],
            1,
            "error: there is no config file 'digit'; give a Python file, or one of ",
        ),
        (
            ["train", "--config=digits:small"],
            1,
            "error: the config 'digits' has no variant 'small': choose from low",
        ),
        (["train", "--config.train.epochs=five"], 2, "error: config.train.epochs is 'five'; give a whole number"),
        (["train", "--config"], 2, "error: --config needs a file"),
        (["train", "stray"], 2, "error: unexpected argument 'stray'"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, code, sentence):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == code and said.err.startswith(sentence) and said.err.count("\n") == 1


def test_no_command_shows_the_commands_and_is_2(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([])
    assert ended.value.code == 2 and "usage: mpisjax COMMAND" in capsys.readouterr().out


def test_configs_have_names():
    known = config_files.packaged_configs()
    assert known.keys() == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert config_files.load_config("digits").to_dict() == (
        config_files.load_config(ROOT / "configs" / "digits.py").to_dict()
    )
    assert config_files.load_config("fashion_mnist:low").name == "fashion_mnist_low"
    with pytest.raises(UserError, match=r"no config file 'imagenet'; give a Python file, or one of arrays, "):
        config_files.load_config("imagenet")


def run_of(seed: int, test: float | None, stopped: bool = False) -> SimpleNamespace:
    found = None if test is None else {"accuracy": test, "accuracy_spikes": test - 0.01}
    return SimpleNamespace(test=found, best_accuracy=0.5 + 0.01 * seed, stopped=stopped)


def sweep(monkeypatch, workdir: Path, seeds: str, accuracies: dict[int, SimpleNamespace]) -> list[tuple[int, str]]:
    """`mpisjax train --seeds SEEDS` with a training that is made up; what it was asked to do."""
    asked = []

    def training(config, folder, stopper, profile):
        asked.append((config.seed, folder))
        Path(folder).mkdir(parents=True)
        return accuracies[config.seed]

    monkeypatch.setattr(train, "_train", training)
    with pytest.raises(SystemExit) as ended:
        train.main(["--seeds", seeds, "--workdir", str(workdir)])
    assert ended.value.code in (0, None)
    return asked


def test_a_sweep_trains_each_seed_in_its_folder_and_says_mean_and_deviation(monkeypatch, tmp_path, capsys):
    runs = {seed: run_of(seed, test) for seed, test in ((0, 0.90), (1, 0.92), (4, 0.97))}
    asked = sweep(monkeypatch, tmp_path / "sweep", "0,1,4", runs)
    assert asked == [(seed, f"{tmp_path}/sweep/seed_{seed}") for seed in (0, 1, 4)]
    said = capsys.readouterr().err
    assert "test accuracy over the seeds: 93.00 ± 3.61%" in said
    assert "test, spikes alone accuracy over the seeds: 92.00 ± 3.61%" in said
    written = json.loads((tmp_path / "sweep" / "seeds.json").read_text())
    assert written["seeds"]["4"]["test"] == 0.97 and written["mean"]["test"] == pytest.approx(0.93)
    assert written["deviation"]["validation"] == pytest.approx(0.0208, abs=1e-4)


def test_a_sweep_that_is_stopped_says_no_mean(monkeypatch, tmp_path, capsys):
    runs = {0: run_of(0, 0.9), 1: run_of(1, None, stopped=True), 2: run_of(2, 0.9)}
    assert len(sweep(monkeypatch, tmp_path / "sweep", "0,1,2", runs)) == 2
    assert "over the seeds" not in capsys.readouterr().err and not (tmp_path / "sweep" / "seeds.json").exists()


def test_a_sweep_names_what_all_seeds_have():
    summary = train.summarize({0: {"validation": 0.5, "test": 0.6}, 1: {"validation": 0.7}})
    assert summary["mean"] == {"validation": pytest.approx(0.6)}
    assert train.summarize({3: {"test": 0.6}})["deviation"] == {"test": 0.0}


@pytest.mark.parametrize(
    ("arguments", "name", "chosen"),
    [
        (["--config.data.name=folder", "--config.data.dir=photos"], "folder", "folder"),
        (["--config.data.name", "arrays", "--config.train.epochs=3"], "arrays", "arrays"),
        (["--config.data.name=ssc"], "shd_ssc", "shd:ssc"),
        (["--config.data.name=dvs_gesture"], "recordings", "recordings"),
        (["--config.data.name=digits", "--config.data.name=recordings"], "recordings", "recordings"),
        (["--config=digits", "--config.data.name=folder"], "digits", None),
        ([], "digits", None),
    ],
)
def test_the_data_set_chooses_the_recipe_and_it_is_said(monkeypatch, capsys, tmp_path, arguments, name, chosen):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_train", lambda config, folder, *more: asked.append((config, folder)) or run_of(0, 0.9))
    with pytest.raises(SystemExit):
        train.main(arguments)
    (config, folder), said = asked[0], capsys.readouterr().err
    assert (config.name, folder) == (name, f"runs/{name}")
    assert (f"settings: --config {chosen}, since data.name is {config.data.name}" in said) == (chosen is not None)
    if "--config.train.epochs=3" in arguments:
        assert config.train.epochs == 3


CONFIG = """
from mpisjax import configuration

SMALL = {"model.layers": (4,), "model.num_streams": 1, "model.stem": (), "model.stem_strides": (),
         "model.stride_layer": 0, "model.fusion_layer": 1, "train.epochs": 2, "train.batch_size": 600}
VARIANTS = {"late": {"train.epochs": 1, "train.learning_rate": 0.01, "forward.mode": "rates"}}


def get_config(variant=None):
    c = configuration.base()
    c.name = "two"
    for key, value in SMALL.items():
        c.update_from_flattened_dict({key: value})
    return configuration.with_variant(c, VARIANTS, variant)
"""


def two_stages(tmp_path: Path, *arguments: str) -> int:
    (tmp_path / "two.py").write_text(CONFIG)
    with pytest.raises(SystemExit) as ended:
        train.main([f"--config={tmp_path / 'two.py'}", f"--workdir={tmp_path / 'run'}", *arguments])
    return ended.value.code or 0


def test_a_second_stage_has_the_variants_settings_and_the_command_lines_otherwise(monkeypatch, tmp_path):
    asked = []

    def training(config, folder, stopper, profile):
        asked.append((folder, config))
        return run_of(0, 0.9)

    monkeypatch.setattr(train, "_train", training)
    assert two_stages(tmp_path, "--then=late", "--config.seed=5", "--config.train.epochs=7") == 0
    (first, one), (second, two) = asked
    assert (first, second) == (str(tmp_path / "run"), str(tmp_path / "run" / "late"))
    assert (one.train.epochs, one.forward.mode, one.train.init_from) == (7, "spikes", "")
    assert (two.train.epochs, two.forward.mode, two.train.init_from) == (1, "rates", first)
    assert (two.seed, two.train.learning_rate, two.name) == (5, 0.01, "two_late")
    assert two_stages(tmp_path, "--then=later") == 1 and len(asked) == 2  # refused before anything is trained


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_ones_best_epoch(tmp_path, capsys):
    assert two_stages(tmp_path, "--then=late") == 0
    assert "now two_late, from the best epoch of" in capsys.readouterr().err
    assert all((tmp_path / "run" / folder / "results.json").exists() for folder in (".", "late"))


# What needs another program, a cloud or much space is no part of requirements.txt.
APART = {"aedat4", "benchmark-peer", "docs", "export-test"}


def test_requirements_txt_has_everything_in_the_ranges_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(one for name, some in extras.items() if name not in APART for one in some),
    ]
    listed = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")}
    assert set(wanted) == listed
