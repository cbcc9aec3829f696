"""The layers that ours and the libraries have in common: 16C3-32C3-48C3s2-FC10. Imports NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LAYERS, KERNEL, CLASSES = (16, 32, 48), 3, 10  # the last layer halves the resolution


class Learner(NamedTuple):
    """A network and its optimiser.

    Attributes:
        step: A training step: images float32 [batch, 28, 28] of 0 to 1 and labels int64 [batch] in, the loss out.
        answer: Images in, the class of each out, int [batch].
    """

    step: Callable[[np.ndarray, np.ndarray], float]
    answer: Callable[[np.ndarray], np.ndarray]
