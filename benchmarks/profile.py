"""The time of a compiled function by kind of operation, from JAX's profiler."""

from __future__ import annotations

import collections
import glob
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Operations that contain others: their time is their contents'.
_CONTAINERS = ("while", "call", "conditional")
_SILENT = {"parameter", "bitcast", "constant", "tuple", "fusion", "get-tuple-element"}


class Operation(NamedTuple):
    """One operation of the compiled program.

    Attributes:
        name: As in the compiled program.
        kind: "arithmetic" (convolutions, XLA's and ours, and matrix products, with what was fused into them),
          "all-reduce" (with waiting for the other devices), "copy" (copies and transposes) or "other".
        seconds: Mean over devices.
        runs: Runs on a device.
        inside: The operations that a fusion consists of.
    """

    name: str
    kind: str
    seconds: float
    runs: float
    inside: str


def _computations(text: str) -> dict[str, str]:
    """HLO text by computation name."""
    parts = re.split(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _descriptions(text: str) -> dict[str, tuple[str, str]]:
    """(kind, contents) by operation name."""
    bodies, found = _computations(text), {}
    for name, line in re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$", text, flags=re.M):
        called = re.search(r"calls=%([\w.\-]+)", line)
        body = bodies.get(called.group(1), "") if called else f"%{name} = {line}"
        shape = re.match(r"\(?\w+\[[\d,]*\]", line)
        insides = re.findall(r"\b([a-z][a-z\-]+)\(", re.sub(r"metadata=\{.*?\}", "", body))
        distinct = sorted(set(insides) - _SILENT)
        what = f"{' '.join(distinct)} -> {shape.group(0) if shape else ''}"
        ours = re.search(r'custom_call_target="(mpisjax_\w+)"', line)
        what = f"{ours.group(1)} {what}" if ours else what
        window = re.search(r"window=\{[^}]*\}", body)
        if re.search(r"\b(convolution|dot)\(", body) or "__onednn" in line or ours:
            found[name] = ("arithmetic", what + (" " + window.group(0) if window else ""))
        elif re.search(r"\ball-reduce(-start|-done)?\(", line):
            found[name] = ("all-reduce", what)
        elif set(distinct) <= {"copy", "transpose", "reshape"}:
            found[name] = ("copy", what)
        else:
            found[name] = ("other", what)
    return found


def profile(executable: Any, prepare: Callable[[], tuple[Any, ...]], devices: int) -> list[Operation]:
    """Runs a compiled function once under the profiler.

    Args:
        executable: What `jit(...).lower(...).compile()` gave.
        prepare: Makes its arguments.
        devices: How many it runs on.

    Returns:
        Operations, the most expensive first; empty where the backend's trace names none.
    """
    descriptions = _descriptions(executable.as_text())
    arguments = jax.block_until_ready(prepare())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(executable(*arguments))
        traces = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        events = []
        for path in traces:
            with gzip.open(path) as file:
                events += json.load(file)["traceEvents"]
    micros: collections.Counter[str] = collections.Counter()
    runs: collections.Counter[str] = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name and not name.startswith(_CONTAINERS):
            micros[name] += event["dur"]
            runs[name] += 1
    return [
        Operation(name, kind, total * 1e-6 / devices, runs[name] / devices, inside)
        for name, total in micros.most_common()
        for kind, inside in [descriptions.get(name, ("other", ""))]
    ]


def by_kind(operations: list[Operation]) -> dict[str, float]:
    """Seconds by kind."""
    sums: collections.defaultdict[str, float] = collections.defaultdict(float)
    for operation in operations:
        sums[operation.kind] += operation.seconds
    return dict(sums)
