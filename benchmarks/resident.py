"""How much memory a process has taken at most. Imports nothing, so that it adds nothing to what it measures."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mib(process: int | str = "self") -> float:
    """The largest resident size so far, in MiB, everything included.

    Not `ru_maxrss` where Linux tells better: a process begins with that of the one that started it.

    Args:
        process: Its number; elsewhere than on Linux this process alone can be asked.
    """
    status = Path(f"/proc/{process}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
