"""Data sets, from where users have them to batches on the devices."""

from mpisjax.data.augment import Augmentation, Inputs, augment, mixup, normalize, prepare_images
from mpisjax.data.feed import Feed, eval_batches
from mpisjax.data.loading import load, summary
from mpisjax.data.splits import class_counts, train_indices
from mpisjax.data.types import Batch, DataSet, Split

__all__ = [
    "Augmentation",
    "Batch",
    "DataSet",
    "Feed",
    "Inputs",
    "Split",
    "augment",
    "class_counts",
    "eval_batches",
    "load",
    "mixup",
    "normalize",
    "prepare_images",
    "summary",
    "train_indices",
]
