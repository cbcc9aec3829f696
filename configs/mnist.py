"""MNIST (LeCun et al., 1998), 60,000 / 10,000 images of 28 x 28, with Fashion-MNIST's network.

    python train.py --config configs/mnist.py[:VARIANT] --config.data.dir=DIR

DIR holds the four IDX files; without it, prepared data or a download serve (docs/data.md).

variant   parameters   the paper's     trained with            test accuracy
-         128,346      no row          rates, 4 solver steps   not run here
t30       128,346      no row          spikes, T = 30          not run here
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"t30": {"forward.mode": "spikes", "forward.num_steps": 30}}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "mnist"
    c.data.name = "mnist"
    c.data.num_validation = 5000
    c.data.augment.shift = 2
    c.model.stem = (16,)
    c.model.layers = (32, 48)
    c.forward.mode = "rates"
    c.forward.max_steps = 4
    c.forward.tol = 2e-2
    c.adjoint.max_steps = 4
    c.adjoint.tol = 2e-2
    c.train.epochs = 15
    c.train.batch_size = 128
    c.train.label_smoothing = 0.1
    return configuration.with_variant(c, VARIANTS, variant)
