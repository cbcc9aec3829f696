"""scikit-learn's 1,797 handwritten digits, 8x8: the default, no download.

    python train.py

Test accuracy (360 digits; one is 0.28%), of the epoch chosen on 180 validation digits, 52,690 parameters, two cores,
`python train.py --config.seed=SEED`, the test split read once a run. Another processor rounds differently, and after 80
epochs that is another network. The last three rows are of neurons that start at half the threshold, as they do now. The
six before them are of neurons that start from rest (--config.neuron.initial_potential=0); their mean is 98.3%.

commit    date         processor                seed   equivalent path   spikes alone, T = 16
047dd37   2026-11-24   AMD EPYC, 85 to 92 s     0      98.06%            97.78%
047dd37   2026-11-24   AMD EPYC                 1      98.61%            98.06%
047dd37   2026-11-24   AMD EPYC                 2      97.50%            97.78%
19083f9   2026-11-25   Intel Xeon, 144 s        0      98.33%            98.33%
19083f9   2026-11-25   Intel Xeon               1      98.89%            98.33%
19083f9   2026-11-25   Intel Xeon               2      98.61%            98.33%
08a6fab   2026-11-28   AMD EPYC, 47 s           0      97.78%            98.06%
08a6fab   2026-11-28   AMD EPYC                 1      98.06%            97.78%
08a6fab   2026-11-28   AMD EPYC                 2      98.33%            98.89%

The recipe was chosen by validation alone: mean accuracy after the last epoch on 360 digits held out of the train split,
in four splits with seeds 10 to 13: 98.9% as it was before (40 epochs, shifts alone), 98.8% with averaged weights, the
same with dropout 0.1 too, 99.0% with mixup 0.2, 99.1% with weight decay 2e-3, 99.2% with 80 epochs, 99.1% with turns of
10 degrees and zoom 0.1, 99.6% as it is here. For comparison: a support vector machine with a Gaussian kernel, its C and
gamma chosen by cross-validation, has 97.78% on the test split.
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
