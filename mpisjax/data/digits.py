"""Scikit-learn's digits, which need no download.

The 1,797 real handwritten digits of 8 x 8 pixels are the test part of the UCI "Optical Recognition of Handwritten
Digits" set (E. Alpaydin and C. Kaynak, 1998): 32 x 32 bitmaps, summed over blocks of 4 x 4, so 17 grey levels.
Scikit-learn's copy has no official split. One is made here: a fixed seed chooses 20% of each class for the test split,
whatever the configuration says.
"""

from __future__ import annotations

import numpy as np

from mpisjax.data.dataset import Loaded, hold_out

NUM_TEST = 360
SPLIT_SEED = 1797
SENTENCE = "digits, from scikit-learn, complete: 1,437 train and 360 test, split by a fixed seed"


def load() -> Loaded:
    """The digits, in the order of the package within each split.

    Returns:
        uint8 [1437, 8, 8, 1] train and [360, 8, 8, 1] test images, the 17 levels spread over 0..255, and int32 labels.
    """
    from sklearn.datasets import load_digits  # a slow import, wanted by this set alone

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    train, test = hold_out(labels, NUM_TEST, SPLIT_SEED)
    return Loaded(images[train], labels[train], images[test], labels[test])


def load_images() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits as intensities in 0..1 [N, 8, 8] and their labels, train and test, split as the digits are."""
    loaded = load()
    return (
        (loaded.train_images[..., 0] / 255, loaded.train_labels),
        (loaded.test_images[..., 0] / 255, loaded.test_labels),
    )
