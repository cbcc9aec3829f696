"""scikit-learn's 1,797 handwritten digits, 8x8: the default, no download.

    python train.py --config configs/digits.py --then low

variant   parameters   the paper's   trained with                  test accuracy
-         52,690       no row        spikes, T = 16                98.06 ± 0.28% (spikes: 98.24 ± 0.58%)
low       52,690       no row        and through time, 10 epochs   97.87, 98.24, 98.33% (spikes, T = 1, 2, 4)

`low` is a second stage for answers in few time steps. The figures are means of seeds 0, 1 and 2 on 360 test digits, of
which one is 0.28%; the epoch was chosen on 180 validation digits, and the test split read once a run. 2-core AMD EPYC,
2026-11-29; the first stage alone takes 42 s. Another processor rounds differently, and after 80 epochs that is another
network. Neurons that start from rest (--config.neuron.initial_potential=0) had 98.33 ± 0.50% by the equivalent path and
98.10 ± 0.27% by spikes (three seeds on each of two machines, 2026-11-24 and 2026-11-25).

The recipe was chosen by validation alone: mean accuracy after the last epoch on 360 digits held out of the train split,
in four splits with seeds 10 to 13: 98.9% as it was before (40 epochs, shifts alone), 98.8% with averaged weights, the
same with dropout 0.1 too, 99.0% with mixup 0.2, 99.1% with weight decay 2e-3, 99.2% with 80 epochs, 99.1% with turns of
10 degrees and zoom 0.1, 99.6% as it is here. For comparison: a support vector machine with a Gaussian kernel, its C and
gamma chosen by cross-validation, has 97.78% on the test split.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"low": configuration.LOW_IMAGES}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
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
    return configuration.with_variant(c, VARIANTS, variant)
