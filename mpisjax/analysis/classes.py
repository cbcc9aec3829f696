"""Class by class: how many examples are right, what they are taken for, and which are wrong."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix


class ClassFigures(NamedTuple):
    """What is known of one class; a share of nothing is None.

    Attributes:
        name: The class.
        examples: How many there are.
        right: How many of them are right.
        recall: Share of its examples that are right.
        precision: Share of the answers that name it that are right.
        mistaken_for: The class that its wrong examples are taken for most often; empty where all are right.
    """

    name: str
    examples: int
    right: int
    recall: float | None
    precision: float | None
    mistaken_for: str


class Mistake(NamedTuple):
    """An example that is wrong.

    Attributes:
        example: Its index in the split.
        label: Its class.
        answer: The class that it was taken for.
        confidence: The probability of that one.
    """

    example: int
    label: str
    answer: str
    confidence: float


class ByClass(NamedTuple):
    """All figures of a split.

    Attributes:
        figures: By class.
        confusion: int [classes, classes]: row true class, column answer.
        mistakes: In the order of the split.
    """

    figures: list[ClassFigures]
    confusion: np.ndarray
    mistakes: list[Mistake]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "classes": [one._asdict() for one in self.figures],
            "confusion": self.confusion.tolist(),
            "misclassified": [one._asdict() for one in self.mistakes],
        }

    def as_csv(self) -> dict[str, str]:
        """Three tables by file name: classes.csv, confusion.csv and misclassified.csv."""
        names = [one.name for one in self.figures]
        rows = [[name, *counts] for name, counts in zip(names, self.confusion.tolist(), strict=True)]
        return {
            "classes.csv": _table(ClassFigures._fields, self.figures),
            "confusion.csv": _table(["true class", *names], rows),
            "misclassified.csv": _table(Mistake._fields, self.mistakes),
        }


def by_class(labels: np.ndarray, answers: np.ndarray, confidence: np.ndarray, names: Sequence[str]) -> ByClass:
    """Compares answers with labels.

    Args:
        labels: int [n], true classes.
        answers: int [n].
        confidence: float [n], the probability of each answer.
        names: Of the classes.
    """
    matrix = confusion_matrix(labels, answers, labels=np.arange(len(names)))
    right, wrong = np.diag(matrix), matrix - np.diag(np.diag(matrix))

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    figures = [
        ClassFigures(
            name=name,
            examples=int(matrix[n].sum()),
            right=int(right[n]),
            recall=share(int(right[n]), int(matrix[n].sum())),
            precision=share(int(right[n]), int(matrix[:, n].sum())),
            mistaken_for=names[int(wrong[n].argmax())] if wrong[n].any() else "",
        )
        for n, name in enumerate(names)
    ]
    mistakes = [
        Mistake(int(n), names[labels[n]], names[answers[n]], round(float(confidence[n]), 4))
        for n in np.flatnonzero(labels != answers)
    ]
    return ByClass(figures, matrix, mistakes)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
