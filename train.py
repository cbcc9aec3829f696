"""Trains a network, or goes on with a run that was interrupted: `mpisjax train` from a clone.

python train.py                                                  # scikit-learn's digits, minutes, no download
python train.py --config configs/fashion_mnist.py --config.data.dir=DIR --config.train.epochs=3
python train.py --help
"""

import sys

import mpisjax_launch

if __name__ == "__main__":
    mpisjax_launch.main(["train", *sys.argv[1:]])
