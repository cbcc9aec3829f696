"""Data sets, from where users have them to batches on the devices."""

from mpisjax.data.arrays import from_arrays
from mpisjax.data.augment import Augmentation, Inputs, augment, mixup, normalize, prepare_images
from mpisjax.data.dataset import Batch, DataSet, Split, class_counts, summary
from mpisjax.data.feed import Feed, eval_batches, train_indices
from mpisjax.data.folders import from_folder, from_recordings, read_image
from mpisjax.data.sources import load

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
    "from_arrays",
    "from_folder",
    "from_recordings",
    "load",
    "mixup",
    "normalize",
    "prepare_images",
    "read_image",
    "summary",
    "train_indices",
]
