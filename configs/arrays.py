"""Arrays of one's own, in an .npz file with x_train, y_train, x_test and y_test: images, or frames over time.

    python train.py --config configs/arrays.py --config.data.dir=FILE.npz

variant   parameters   the paper's   trained with                  test accuracy
-         52,690       no row        spikes, T = 8                 yours
low       52,690       no row        and through time, 10 epochs   yours (spikes alone)

Counted for 10 classes and grey images. A tenth of the train split is held out for validation. Numbers other than bytes
need their range, --config.data.value_range=0,1; docs/data.md has the rest.

`low` is a second stage for answers in few time steps: add --then low.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"low": configuration.LOW_IMAGES}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "arrays"
    c.data.name = "arrays"
    c.data.validation_share = 0.1
    c.model.stem = (16,)
    c.model.layers = (24, 32)
    c.forward.mode = "spikes"
    c.forward.num_steps = 8
    c.train.epochs = 30
    c.train.batch_size = 32
    c.train.learning_rate = 0.05
    c.train.weight_decay = 1e-3
    c.train.label_smoothing = 0.1
    c.train.warmup_epochs = 2.0
    return configuration.with_variant(c, VARIANTS, variant)
