"""Figures class by class, and the misclassified examples, against counting by hand."""

import csv
import io

import numpy as np

from mpisjax.analysis import figures
from mpisjax.analysis.classes import by_class

LABELS = np.array([0, 0, 0, 1, 1, 2])
ANSWERS = np.array([0, 1, 1, 1, 1, 0])
CONFIDENCE = np.array([0.9, 0.6, 0.51234, 0.8, 0.7, 0.4])
NAMES = ("cat", "dog", "owl", "none of them")


def test_every_class_is_counted():
    found = by_class(LABELS, ANSWERS, CONFIDENCE, NAMES)
    assert found.confusion.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    cat, dog, owl, none = found.figures
    assert cat == ("cat", 3, 1, 1 / 3, 1 / 2, "dog")
    assert dog == ("dog", 2, 2, 1.0, 1 / 2, "")
    assert owl == ("owl", 1, 0, 0.0, None, "cat")
    assert none == ("none of them", 0, 0, None, None, "")
    assert found.mistakes == [(1, "cat", "dog", 0.6), (2, "cat", "dog", 0.5123), (5, "owl", "cat", 0.4)]


def test_they_are_written_as_csv_and_json():
    found = by_class(LABELS, ANSWERS, CONFIDENCE, NAMES)
    tables = {name: list(csv.reader(io.StringIO(text))) for name, text in found.as_csv().items()}
    assert tables["confusion.csv"][:2] == [["true class", *NAMES], ["cat", "1", "2", "0", "0"]]
    assert tables["misclassified.csv"][:2] == [
        ["example", "label", "answer", "confidence"],
        ["1", "cat", "dog", "0.6"],
    ]
    assert tables["classes.csv"][3] == ["owl", "1", "0", "0.0", "", "cat"] and len(tables["classes.csv"]) == 5
    plain = found.as_json()
    assert plain["misclassified"][2] == {"example": 5, "label": "owl", "answer": "cat", "confidence": 0.4}
    assert plain["classes"][0]["recall"] == 1 / 3 and plain["confusion"][0] == [1, 2, 0, 0]


def test_a_contact_sheet_shows_pictures_of_every_kind():
    rng = np.random.default_rng(0)
    for shape in ((6, 6, 1), (6, 6, 3), (4, 6, 6, 2)):
        images = rng.integers(0, 256, (11, *shape)).astype(np.uint8)
        figure = figures.contact_sheet(images, [f"picture {n}" for n in range(11)])
        shown = [axis for axis in figure.axes if axis.images]
        assert len(shown) == 11 and shown[10].get_title() == "picture 10"
        assert figures.as_png(figure).startswith(b"\x89PNG")


def test_a_confusion_matrix_names_its_classes():
    def labels(names):
        axis = figures.confusion(np.eye(len(names), dtype=int), names).axes[0]
        shown = [[text.get_text() for text in one.get_ticklabels()] for one in (axis.xaxis, axis.yaxis)]
        assert shown[0] == shown[1] and list(axis.get_xticks()) == list(axis.get_yticks())
        return shown[0], list(axis.get_xticks()), axis.get_xticklabels()[0].get_rotation()

    assert labels(["cat", "dog"]) == (["cat", "dog"], [0, 1], 0)
    long = ["a", "b", "ankle boots, brown", *"cdefghi"]
    assert labels(long) == (["a", "b", "ankle boots, …", *"cdefghi"], list(range(10)), 0)
    many, places, turned = labels([f"class {n}" for n in range(100)])
    assert places == list(range(0, 100, 4)) and many[1] == "class 4" and turned == 90
