"""What a training step costs against size, against devices, and on a CPU against the way its cores are used.

The cores are used in three ways: one core alone, all cores by one host device, and a host device for each
core. Each way needs a process of its own, because a process settles JAX's devices once (`mpisjax.cpu.cores`):

    python -m benchmarks.scaling NETWORK USE_OF_CORES SCOPE_AS_JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax

from benchmarks.nets import Subject, case
from benchmarks.sections import Rows, Scope, fixed_step
from benchmarks.timing import measure
from mpisjax.nn import flops

USES_OF_CORES = ("one core", "all, one device", "all, a device each")
_FORCE = "--xla_force_host_platform_device_count"


def measure_scaling(scope: Scope) -> Rows:
    """A row for each size, number of devices, and use of the cores."""
    batches, widths, streams = (
        ((32, 64), (32, 64), (1, 2)) if scope.quick else ((16, 64, 256), (16, 32, 64, 128), (1, 2, 3))
    )
    rows = [measure_step(scope, "batch size", "fashion", n, batch_size=n) for n in batches]
    rows += [measure_step(scope, "width", "f64c5", n, layers=(n,)) for n in widths]
    rows += [measure_step(scope, "streams", "fashion", n, num_streams=n) for n in streams]
    for name in scope.cases if len(jax.devices()) > 1 else ():
        rows += [measure_step(scope, "devices", name, n, n) for n in (1, len(jax.devices()))]
    return rows + measure_cores(scope)


def measure_step(
    scope: Scope, axis: str, name: str, value: Any, num_devices: int | None = None, **settings: Any
) -> dict[str, Any]:
    """The cost of a rate-mode step of 4 evaluations of f and 4 adjoint iterations.

    Args:
        scope: How much to measure.
        axis: What is varied, for tables.
        name: The network.
        value: Where on the axis this is.
        num_devices: Devices to share the batch; None: as training takes them.
        **settings: Of `benchmarks.nets.case`.
    """
    s = Subject(case(name, dtype=scope.dtype, **settings), num_devices=num_devices, warmup=1)
    step = fixed_step(s, 4, 4)
    timing = measure(step, s.step_arguments, **scope.spend(0.4))
    work = flops.count(step, *s.step_arguments(), trips=[4, 4])
    return {
        "axis": axis,
        "net": s.case.title,
        "value": value,
        "seconds": timing.seconds,
        "cpu_seconds": timing.cpu,
        "ms_a_sample": 1e3 * timing.seconds / s.case.config.train.batch_size,
        "GFLOP/s": work / timing.seconds / 1e9,
    }


def measure_cores(scope: Scope) -> Rows:
    """A row for each network and use of the cores; none on accelerators or with a forced device count."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "cpu" or _FORCE in flags:
        return []
    clean = {key: value for key, value in os.environ.items() if key != "PJRT_NPROC"}
    rows = []
    for name in scope.cases:
        for use in USES_OF_CORES:
            environment = {**clean, "JAX_PLATFORMS": "cpu"}
            if use == USES_OF_CORES[2]:
                environment["XLA_FLAGS"] = f"{flags} {_FORCE}={os.cpu_count()}"
            command = [sys.executable, "-m", "benchmarks.scaling", name, use, json.dumps(scope._asdict())]
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    return rows


if __name__ == "__main__":
    from mpisjax.cpu import cores

    network, use_of_cores, asked = sys.argv[1:]
    cores.prepare(all_cores=use_of_cores != USES_OF_CORES[0])
    print(json.dumps(measure_step(Scope(**json.loads(asked)), "cores", network, use_of_cores)))
