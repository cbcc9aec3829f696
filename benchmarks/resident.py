"""How much memory a process has taken at most. Imports nothing, so that it adds nothing to what it measures."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mib(process: int | str = "self") -> float:
    """The largest resident size so far, in MiB, everything included.

    Not `ru_maxrss` where Linux tells better: a process begins with that of the one that started it.

    Args:
        process: Its number; elsewhere than on Linux this process alone can be asked. 0 for one that has ended.
    """
    status = Path(f"/proc/{process}/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0) / 2**10
    if process != "self":
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Makes `peak_mib` begin anew, at what this process holds now; on Linux alone."""
    if (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")
