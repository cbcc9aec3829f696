"""What a measurement holds for: processor, cores, devices, versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """This machine in words and numbers, as JSON can hold it."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    device = jax.devices()[0]
    kind = "host device" if device.platform == "cpu" else device.device_kind
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "devices": f"{len(jax.devices())} x {kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
