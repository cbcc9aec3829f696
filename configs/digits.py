"""scikit-learn's 1,797 handwritten digits, 8x8: the default, no download.

    python train.py

Test accuracy (360 digits; one is 0.28%), of the epoch chosen on 180 validation digits, 52,690 parameters, on a 2-core
AMD EPYC, 2026-11-24, `python train.py --config.seed=SEED`, about 50 s each:

commit    seed   equivalent path   spikes alone, T = 16
8f35966   0      97.22%            97.78%
8f35966   1      98.61%            97.78%
a654d7e   2      98.33%            98.33%
ba38b81   0      98.89%            98.89%
ba38b81   1      98.06%            98.06%
ba38b81   2      98.33%            97.78%

The commits differ in how layers are folded and convolved: in rounding as far as is known, which is not far.
"""

import ml_collections

from mpisjax import configuration


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings; there are no variants."""
    if variant:
        raise configuration.UserError(f"configs/digits.py has no variant {variant!r}: leave it out.")
    c = configuration.base()
    c.name = "digits"
    c.data.name = "digits"
    c.data.num_validation = 180
    c.data.augment.rotate = 15.0
    c.data.augment.zoom = 0.15
    c.data.augment.shift = 1
    c.model.stem = (16,)
    c.model.layers = (24, 32)
    c.forward.mode = "spikes"
    c.forward.num_steps = 16
    c.train.epochs = 80
    c.train.batch_size = 64
    c.train.learning_rate = 0.1
    c.train.weight_decay = 1e-3
    c.train.label_smoothing = 0.1
    c.train.ema = 0.99
    c.train.log_every = 20
    c.train.warmup_epochs = 2.0
    return c
