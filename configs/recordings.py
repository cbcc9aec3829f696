"""Recordings of an event camera of one's own, in DIR/CLASS or in DIR/train/CLASS and DIR/test/CLASS: .bin, .aedat,
.aedat4 or .npy.

    python train.py --config configs/recordings.py --config.data.dir=DIR

variant   parameters   the paper's   trained with                  test accuracy
-         59,554       no row        spikes, T = 10 frames         yours
low       59,554       no row        and through time, 10 epochs   yours (spikes alone)

Counted for 10 classes and a sensor of 34 x 34. A fixed seed takes a fifth of each class for the test split where there
is no folder `test`, and 15% of the rest for validation. docs/data.md has the rest.

`low` is a second stage for answers in few time steps: add --then low.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"low": configuration.LOW_FRAMES}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "recordings"
    c.data.name = "recordings"
    c.data.validation_share = 0.15
    c.data.num_frames = 10
    c.data.augment.shift = 2
    c.model.stem = (16,)
    c.model.stem_strides = (2,)
    c.model.layers = (24, 32)
    c.forward.mode = "spikes"
    c.adjoint.max_steps = 5
    c.adjoint.tol = 2e-2
    c.train.epochs = 30
    c.train.batch_size = 16
    c.train.learning_rate = 0.05
    c.train.label_smoothing = 0.1
    c.train.log_every = 10
    c.train.warmup_epochs = 2.0
    return configuration.with_variant(c, VARIANTS, variant)
