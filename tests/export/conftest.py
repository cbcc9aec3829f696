"""Puts this folder on the path, and the small networks of tests/nn."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nn")]
