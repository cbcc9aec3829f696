"""Fashion-MNIST (Zalando, 2017), 60,000 / 10,000 images of 28 x 28.

    python train.py --config configs/fashion_mnist.py[:VARIANT] --config.data.dir=DIR

DIR holds the four IDX files; without it, prepared data or a download serve (docs/data.md).

variant   parameters   the paper's     trained with            test accuracy
-         128,346      133K            rates, 4 solver steps   92.52% after 12 + 22 epochs (spikes alone, T = 30: 92.22%)
t30       128,346      133K, 93.14%    spikes, T = 30          not run here
t100      128,346      133K, 93.23%    spikes, T = 100         not run here
large_t1  2,629,514    ?, 93.83%       spikes, T = 1           not run here
ide_t30   127,823      ?               spikes, T = 30          not run here

Two streams, stem 1-16, layers 32-48. The paper's 133K are met when one counts an injection into the second stream, which is
not there, as that stream starts from zero. The size of the paper's large network is not known to us. `ide_t30` is the
baseline of as many parameters: one stream, wider, its feedback bounded by its operator norm, a dense layer on its rates.

Measured on 2-core CPUs that other work kept busy, seed 0, in two cycles, with
    python train.py --config configs/fashion_mnist.py --config.data.dir=DIR --workdir=runs/fashion_first
        --config.train.epochs=12 --config.train.ema=0.998
    python train.py --config configs/fashion_mnist.py --config.data.dir=DIR --config.train.init_from=runs/fashion_first
        --config.train.epochs=22 --config.train.ema=0.998 --config.forward.tol=0.5 --config.adjoint.tol=0.5
2026-11-24, AMD EPYC, commit 32a6b15: validation 92.54%, test 91.85%; 2026-11-25, Intel Xeon, commit 8e2c07e: validation
93.74%, test 92.52%. The solvers do not reach their tolerance in 4 steps: the residual was 0.32 at the end of the first cycle
and 0.38 near the end of the second. The paper's 93.14% is not reached.
"""

import ml_collections

from mpisjax import configuration

VARIANTS = {
    "t30": {"forward.mode": "spikes", "forward.num_steps": 30},
    "t100": {"forward.mode": "spikes", "forward.num_steps": 100},
    "large_t1": {
        "forward.mode": "spikes",
        "forward.num_steps": 1,
        "model.stem": (64,),
        "model.layers": (128, 256),
    },
    "ide_t30": {
        "forward.mode": "spikes",
        "forward.num_steps": 30,
        "model.num_streams": 1,
        "model.fusion_layer": 1,
        "model.feedback_norm": "spectral",
        "model.head": "smallest",
        "model.layers": (33, 48),
    },
}


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings, as a variant changes them."""
    c = configuration.base()
    c.name = "fashion_mnist"
    c.data.name = "fashion_mnist"
    c.data.num_validation = 5000
    c.data.augment.flip = True  # shifts cost this small a network more than they give (docs/pretrained.md)
    c.model.stem = (16,)
    c.model.layers = (32, 48)
    c.forward.mode = "rates"
    c.forward.max_steps = 6
    c.forward.tol = 5e-2
    c.forward.damping = 0.3
    c.adjoint.max_steps = 2
    c.adjoint.tol = 5e-2
    c.adjoint.damping = 0.3
    c.train.epochs = 40
    c.train.ema = 0.998
    c.train.batch_size = 128
    c.train.label_smoothing = 0.1
    return configuration.with_variant(c, VARIANTS, variant)
