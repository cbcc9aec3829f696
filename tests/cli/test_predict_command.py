"""`mpisjax predict`: a table with a row for each file, whatever the file is."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
from PIL import Image

from mpisjax import data
from mpisjax.cli import predict

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten digits in two folders, a blank, what is no image, and hidden files."""
    place = tmp_path_factory.mktemp("photos")
    (place / "more").mkdir()
    test = data.load("digits").test
    for number in range(10):
        where = place / "more" if number % 2 else place
        Image.fromarray(test.images[number][:, :, 0]).save(where / f"{number}.PNG")
    Image.new("L", (60, 60), 200).save(place / "blank.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(place / "noise.png")
    (place / "broken.jpg").write_bytes(b"no image")
    for name in (".DS_Store", "._0.PNG", "notes.txt"):
        (place / name).write_bytes(b"x")
    return place, test.labels[:10]


def table(path):
    with open(path, newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_every_file_has_its_row(folder, tmp_path, capsys):
    place, labels = folder
    out = tmp_path / "answers.csv"
    predict.main([str(place), "--pretrained", "digits", "--out", str(out)])
    rows = table(out)
    assert len(rows) == 13 and list(next(iter(rows.values()))) == list(predict.COLUMNS)
    right = 0
    for number, label in enumerate(labels):
        row = rows[str((place / "more" if number % 2 else place) / f"{number}.PNG")]
        right += row["class"] == str(label)
        assert 0 < float(row["confidence"]) <= 1 and row["steps"] == "16" and int(row["spikes"]) > 1000
    assert right >= 9
    assert rows[str(place / "noise.png")]["note"] == predict.UNLIKE
    assert "is blank" in rows[str(place / "blank.png")]["note"] and not rows[str(place / "blank.png")]["class"]
    assert "cannot be read" in rows[str(place / "broken.jpg")]["note"]
    said = capsys.readouterr()
    assert re.fullmatch(
        r"11 of 13 files have a class; (1 of them is|2 of them are) unlike the training data of digits; "
        r"see .*answers.csv\n",
        said.err,
    )
    assert not said.out


def test_files_are_answered_early_on_standard_output(folder, capsys):
    place, labels = folder
    predict.main([str(place / "0.PNG"), str(place / "2.PNG"), "--pretrained", "digits", "--confidence", "0.6"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["class"] for row in rows] == [str(labels[0]), str(labels[2])]
    assert all(int(row["steps"]) < 16 and float(row["confidence"]) >= 0.6 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["absent.png", "--pretrained=digits"], 1, "there is no file and no folder absent.png"),
        (["{empty}", "--pretrained=digits"], 1, "holds no image; name files"),
        (["{broken}", "--pretrained=digits"], 1, "no file could be named; the first: "),
        (["{broken}", "--workdir=runs/none"], 1, "there is no run and no network runs/none"),
        (["{broken}", "--pretrained=saccade_digits"], 1, "saccade_digits reads event frames, not image files"),
        (["{broken}", "--pretrained=digits", "--out=none/a.csv"], 1, "--out none/a.csv lies in no folder"),
        (["{broken}", "--pretrained=digits", "--confidence=2"], 2, "'2' is not a probability above 0"),
        (["{broken}"], 2, "one of the arguments --workdir --pretrained is required"),
    ],
)
def test_a_mistake_is_one_sentence(folder, tmp_path, capsys, arguments, code, sentence):
    given = [one.format(empty=tmp_path, broken=folder[0] / "broken.jpg") for one in arguments]
    with pytest.raises(SystemExit) as ended:
        predict.main(given)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == code and said[-1].startswith("error: ") and sentence in said[-1]
