"""What the paper reports, as far as it is known here. Nothing is filled in that is not."""

from __future__ import annotations

from typing import Any

from experiments import tables

UNKNOWN, NO_ROW = "not known here", "no row"

# Test accuracy in %, by data set, network and time steps.
ACCURACY = {
    ("Fashion-MNIST", "MPIS, implicit", 30): "93.14",
    ("Fashion-MNIST", "MPIS, two streams", 30): "93.14",  # the fair fight's name for the same network
    ("Fashion-MNIST", "MPIS, two streams, spikes of T = 30", 30): "93.14",
    ("Fashion-MNIST", "MPIS, implicit", 100): "93.23",
    ("Fashion-MNIST", "MPIS, large", 1): "93.83",
}
# Parameters, by data set and network.
PARAMETERS = {
    ("Fashion-MNIST", "MPIS, implicit"): "133K",
    ("Fashion-MNIST", "MPIS, two streams"): "133K",
    ("N-MNIST", "MPIS, implicit"): "213K",
    ("CIFAR-10", "MPIS, implicit"): "28.5M",
    ("CIFAR-10", "MPIS, small"): "11.8M",
    ("CIFAR-100", "MPIS, implicit"): "30.0M",
    ("CIFAR-100", "MPIS, small"): "14.8M",
}
# Table 2; which of its layers is which of ours is not known.
FIRING_RATES = "8e-4, 7e-4 and 7e-5"


def accuracy(data: str, title: str, steps: int) -> str:
    """The paper's test accuracy in %, or why there is none."""
    return NO_ROW if data == "digits" else ACCURACY.get((data, title, steps), UNKNOWN)


def parameters(data: str, title: str) -> str:
    """The paper's parameter count, or why there is none."""
    return NO_ROW if data == "digits" else PARAMETERS.get((data, title), UNKNOWN)


def beside(net: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """The first cells of a network's row: name, parameters and accuracy, the paper's before ours."""
    return [
        net["data"],
        net["title"],
        str(net["steps"]),
        parameters(net["data"], net["title"]),
        f"{runs[0]['parameters']:,}" if runs else tables.MISSING,
        accuracy(net["data"], net["title"], net["steps"]),
        *(tables.across_seeds([r[kind] for r in runs], factor=100) for kind in ("accuracy", "accuracy_spikes")),
    ]
