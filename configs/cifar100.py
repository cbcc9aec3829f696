"""CIFAR-100 (Krizhevsky, 2009), 50,000 / 10,000 images of 32 x 32 x 3.

    python train.py --config configs/cifar100.py[:VARIANT] --config.data.dir=DIR

DIR holds cifar-100-binary.tar.gz; without it, prepared data or a download serve (docs/data.md).

variant    parameters   the paper's   trained with            test accuracy
-          29,693,668   30.0M         rates, 6 solver steps   not run here
t5         29,693,668   30.0M         spikes, T = 5           not run here
t10        29,693,668   30.0M         spikes, T = 10          not run here
t30        29,693,668   30.0M         spikes, T = 30          not run here
small      14,922,340   14.8M         rates, 6 solver steps   not run here
small_t5   14,922,340   14.8M         spikes, T = 5           not run here
small_t10  14,922,340   14.8M         spikes, T = 10          not run here
small_t30  14,922,340   14.8M         spikes, T = 30          not run here
ide_t30    29,732,389   ?             spikes, T = 30          not run here
laptop        916,292   no row        rates, 5+2 steps        64.56% (equivalent path, T = 8)
laptop_low    916,292   no row        spikes, T = 2, 4, 8     64.89% (spikes alone, T = 8)

Two streams, stem 3-128-128, layers 256-512-1024, fused at layer 1; the small network's layers are 192-256-768, chosen
to meet the paper's count. LIF neurons of leak 0.99. `ide_t30` is the baseline of as many parameters: one stream, wider,
its feedback bounded by its operator norm, a dense layer on its rates.

`laptop` is a network for two cores, `laptop_low` its second stage for few time steps: add --then laptop_low.
docs/results/cifar100.md has its curve, its time steps and its cost (one seed, 2-core AMD EPYC, 2026-11-28).
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import ml_collections

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("cifar10.py"))))
VARIANTS = shared.variants_of(small=(192, 256, 768), one_stream=(392, 776, 1560))


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The settings of configs/cifar10.py, as a variant changes them."""
    return shared.settings_of("cifar100", VARIANTS, variant)
