"""What the classes of the data sets are called."""

from __future__ import annotations

from mpisjax.data.recordings import CIFAR10_CLASSES

_DIGITS = tuple("0123456789")
_NAMES = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "nmnist": _DIGITS,
    "saccade_digits": _DIGITS,
    "cifar10": CIFAR10_CLASSES,
    "fashion_mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip


def class_names(name: str, count: int) -> tuple[str, ...]:
    """The names of a data set's classes; "class 0" and so on where they are not written down here.

    Args:
        name: The data set's name in the configuration.
        count: The number of classes.
    """
    return _NAMES.get(name) or tuple(f"class {number}" for number in range(count))
