"""Data sets, from where users have them to batches on the devices."""

from mpisjax.data.augment import augment, mixup, normalize
from mpisjax.data.feed import Feed, eval_batches
from mpisjax.data.loading import load, summary
from mpisjax.data.splits import class_counts, train_indices
from mpisjax.data.types import Batch, DataSet, Split

__all__ = [
    "Batch",
    "DataSet",
    "Feed",
    "Split",
    "augment",
    "class_counts",
    "eval_batches",
    "load",
    "mixup",
    "normalize",
    "summary",
    "train_indices",
]
