"""Classifies an image file and shows how the network came to its answer: `mpisjax demo` from a clone.

python demo.py digit.png
python demo.py --help
"""

import sys

import mpisjax_launch

if __name__ == "__main__":
    mpisjax_launch.main(["demo", *sys.argv[1:]])
