"""Not the package: it lets `python examples/NAME.py` find the package, which lies beside this folder and not in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
del sys.modules["mpisjax"]  # this file, which Python found first
import mpisjax  # noqa: E402, F401
