"""Fashion-MNIST (Zalando, 2017), 60,000 / 10,000 images, at the paper's size.

python train.py --config configs/fashion_mnist.py --config.data.dir=<folder with the IDX files>
"""

import ml_collections

from mpisjax import configuration


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings."""
    c = configuration.base()
    c.name = "fashion_mnist"
    c.data.name = "fashion_mnist"
    c.data.num_validation = 5000
    c.data.augment.flip = True
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
    return c
