"""`python -m mpisjax COMMAND`, as the program `mpisjax`."""

import sys

from mpisjax.cli.main import main

main(sys.argv[1:])
