"""Images of one's own, in DIR/CLASS or in DIR/train/CLASS and DIR/test/CLASS: PNG, JPEG, BMP or WebP, a few dozen up.

    python train.py --config configs/folder.py --config.data.dir=DIR

variant   parameters   the paper's   trained with                  test accuracy
-         53,227       no row        spikes, T = 8                 yours
low       53,227       no row        and through time, 10 epochs   yours (spikes alone)

Counted for 3 classes and colour. Images are brought to 32 x 32 pixels (`data.image_size`, `data.fit`); a fixed seed
takes a fifth of each class for the test split where there is no folder `test`, and 15% of the rest for validation.
Thousands of images need fewer epochs: --config.train.epochs=30. docs/data.md has the rest.

`low` is a second stage for answers in few time steps: add --then low.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"low": configuration.LOW_IMAGES}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "folder"
    c.data.name = "folder"
    c.data.validation_share = 0.15
    c.data.augment.flip = True
    c.data.augment.shift = 3
    c.model.stem = (16,)
    c.model.stem_strides = (2,)
    c.model.layers = (24, 32)
    c.forward.mode = "spikes"
    c.forward.num_steps = 8
    c.train.epochs = 120  # few images make few steps an epoch
    c.train.batch_size = 8
    c.train.learning_rate = 0.03
    c.train.weight_decay = 1e-3
    c.train.label_smoothing = 0.1
    c.train.log_every = 5
    c.train.warmup_epochs = 2.0
    return configuration.with_variant(c, VARIANTS, variant)
