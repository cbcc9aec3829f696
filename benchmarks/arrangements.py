"""The same training step on one core, on all cores of one host device, and on a host device a core.

    python -m benchmarks.arrangements fashion "one core" '{"quick": false, "repeats": 10, "budget": 8.0, "dtype": "float32"}'

Each in a process of its own, since JAX's devices are settled once a process (`mpisjax.cpu.cores`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax

from benchmarks.sections import Scope, scaled

ARRANGEMENTS = ("one core", "all, one device", "all, a device each")
_FORCE = "--xla_force_host_platform_device_count"


def measure(scope: Scope) -> list[dict[str, Any]]:
    """A row for each network and arrangement; none on accelerators, and none where the user forced a count."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "cpu" or _FORCE in flags:
        return []
    clean = {key: value for key, value in os.environ.items() if key != "PJRT_NPROC"}
    rows = []
    for name in scope.cases:
        for arrangement in ARRANGEMENTS:
            environment = {**clean, "JAX_PLATFORMS": "cpu"}
            if arrangement == ARRANGEMENTS[2]:
                environment["XLA_FLAGS"] = f"{flags} {_FORCE}={os.cpu_count()}"
            command = [
                sys.executable,
                "-m",
                "benchmarks.arrangements",
                name,
                arrangement,
                json.dumps(scope._asdict()),
            ]
            ran = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True
            )
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    return rows


if __name__ == "__main__":
    from mpisjax.cpu import cores

    cores.prepare(all_cores=sys.argv[2] != ARRANGEMENTS[0])

    found = scaled(Scope(**json.loads(sys.argv[3])), "cores", sys.argv[1], sys.argv[2])
    print(json.dumps(found))
