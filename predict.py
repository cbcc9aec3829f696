"""Names the class of each image file: `mpisjax predict` from a clone.

python predict.py DIR --workdir runs/folder --out answers.csv
python predict.py --help
"""

import sys

import mpisjax_launch

if __name__ == "__main__":
    mpisjax_launch.main(["predict", *sys.argv[1:]])
