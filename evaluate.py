"""Measures a trained network: `mpisjax evaluate` from a clone.

python evaluate.py --workdir runs/digits
python evaluate.py --help
"""

import sys

import mpisjax_launch

if __name__ == "__main__":
    mpisjax_launch.main(["evaluate", *sys.argv[1:]])
