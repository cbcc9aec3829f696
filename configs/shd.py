"""Spiking Heidelberg Digits (Cramer et al., 2020), 8,156 / 2,264 spoken digits as spikes of 700 channels, in German and
English.

    python train.py --config configs/shd.py[:VARIANT] --config.data.dir=DIR

DIR holds shd_train.h5 and shd_test.h5 (ssc_train.h5, ssc_valid.h5 and ssc_test.h5); without it, a download serves
(docs/data.md). The sets were not at hand: small files made in their format have been through this.

variant   parameters   the paper's   trained with             test accuracy
-         142,740      no row        spikes, T = 50 frames    not run here
ssc       144,675      no row        spikes, T = 50 frames    not run here

A recording is frames [time, channels], an image of one pixel for the network: its convolutions of 1 x 1 are dense
layers, 700-128, then one stream of 128-128 whose feedback is recurrent.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {"ssc": {"data.name": "ssc", "data.num_validation": 0}}  # it has a validation split of its own


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "shd"
    c.data.name = "shd"
    c.data.num_validation = 800
    c.data.num_frames = 50
    c.model.stem = (128,)
    c.model.layers = (128, 128)
    c.model.num_streams = 1
    c.model.fusion_layer = 1
    c.model.stride_layer = 0
    c.model.kernel_size = 1
    c.model.head = "smallest"
    c.model.dropout = 0.2
    c.forward.mode = "spikes"
    c.adjoint.max_steps = 5
    c.adjoint.tol = 2e-2
    c.train.epochs = 30
    c.train.batch_size = 64
    c.train.learning_rate = 0.05
    c.train.label_smoothing = 0.1
    return configuration.with_variant(c, VARIANTS, variant)
