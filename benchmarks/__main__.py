"""Measures time, memory and solver steps in one run; writes results.json, results.md and plots.

    python -m benchmarks                                  # everything on this machine, about 10 minutes
    python -m benchmarks --quick                          # a look, under two minutes
    python -m benchmarks --only steps,memory --out DIR
    python -m benchmarks --peer torch                     # also beside PyTorch (pip install torch)
    python -m benchmarks --only peer --peer snntorch,spikingjelly,spyx   # beside these, where they are installed

    python -m benchmarks --gpu                            # all rows of a GPU, within eight minutes
    python -m benchmarks --gpu --quick                    # the same way with tiny networks, on any machine
    python -m benchmarks --only footprint --data_dir DIR  # peak memory of every config, minutes
    python -m benchmarks --only accuracy --data_dir DIR   # Fashion-MNIST from nothing, minutes
    python -m benchmarks --only race --data_dir DIR --peer snntorch,spikingjelly   # to 90%, ours and theirs

Sections: peaks, steps, memory, adjoint, scaling, solvers, profile, loader, startup, inference, and by --only alone
footprint, accuracy and race. --quick takes fewer points of each and leaves scaling, profile, startup and inference to
--only. Times are medians; processor seconds count every thread. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpisjax_launch
from benchmarks import libraries
from mpisjax.cli import report_user_errors
from mpisjax.cli.arguments import Parser, local_path, names, path, whole_number

SECTIONS = (
    "peaks",
    "steps",
    "memory",
    "adjoint",
    "scaling",
    "solvers",
    "profile",
    "loader",
    "startup",
    "inference",
)
QUICK = ("peaks", "steps", "memory", "adjoint", "solvers", "loader")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `sections` is what it asks for."""
    parser = Parser("python -m benchmarks", __doc__)
    parser.add_argument(
        "--only",
        type=names((*SECTIONS, "footprint", "accuracy", "peer", "race")),
        help="sections, separated by commas; all by default",
    )
    parser.add_argument("--out", default="runs/benchmarks", type=local_path, help="folder for the results")
    parser.add_argument("--data_dir", type=path, default="", help="data sets' files, or folders named after the sets")
    parser.add_argument("--quick", action="store_true", help="fewer sections, points and repeats")
    parser.add_argument(
        "--peer",
        type=names(("torch", *libraries.LIBRARIES)),
        default=(),
        help="also measure IDE-FSNN's method in PyTorch (torch), or libraries, separated by commas",
    )
    parser.add_argument("--gpu", action="store_true", help="measure a GPU, and nothing else")
    parser.add_argument("--repeats", type=whole_number(1), help="most timed calls of a point; 10, with --quick 3")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of currents and rates")
    flags = parser.parse_args(argv)
    flags.sections = flags.only or (QUICK if flags.quick else SECTIONS)
    if "peer" in flags.sections and not flags.peer:
        flags.peer = ("torch",)
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and writes; returns the results."""
    flags = arguments(argv)
    if flags.gpu and not flags.quick:
        import jax

        if jax.default_backend() != "gpu":
            print(
                f"error: --gpu needs a GPU, and JAX finds {jax.default_backend()}: pip install 'jax[cuda12]', or add"
                " --quick for a dry run",
                file=sys.stderr,
            )
            sys.exit(1)
    for asked in flags.peer:
        if needs := libraries.missing(asked):
            print(f"error: {needs}", file=sys.stderr)
            sys.exit(1)
    from mpisjax.cpu import cores

    cores.prepare()

    from benchmarks import footprint, loader, report, scaling, sections, user
    from benchmarks.machine import machine

    scope = sections.Scope(
        quick=flags.quick,
        repeats=flags.repeats or (3 if flags.quick else 10),
        budget=2.0 if flags.quick else 8.0,
        dtype=flags.dtype,
    )
    today = datetime.date.today().isoformat()
    results: dict[str, Any] = {"machine": {**machine(), "dtype": flags.dtype, "quick": flags.quick, "date": today}}
    began = time.perf_counter()

    def keep(name: str, rows: Any) -> None:
        results[name] = [*results.get(name, []), *rows] if isinstance(rows, list) else rows
        report.write(results, flags.out)  # whatever was measured is kept, whatever comes
        print(f"[{time.perf_counter() - began:6.0f} s] {name}\n{report.section(rows)}", flush=True)

    if flags.gpu:
        _measure_gpu(flags, results, keep)
        return results
    measured = {
        "peaks": lambda: sections.measure_peaks(scope),
        "steps": lambda: sections.measure_steps(scope, sections.convolution_peak(results["peaks"])),
        "memory": lambda: sections.measure_memory(scope),
        "adjoint": lambda: sections.measure_adjoint(scope),
        "scaling": lambda: scaling.measure_scaling(scope),
        "solvers": lambda: sections.measure_solvers(scope),
        "profile": lambda: sections.measure_profile(scope),
        "loader": lambda: loader.measure(flags.data_dir, quick=flags.quick),
        "startup": user.measure_startup,
        "inference": lambda: user.measure_inference(quick=flags.quick, repeats=scope.repeats),
        "footprint": lambda: footprint.measure(flags.data_dir, quick=flags.quick),
        "accuracy": lambda: user.measure_accuracy(flags.data_dir),
    }
    for name, measure in measured.items():
        if name in flags.sections or (name == "peaks" and "steps" in flags.sections):
            rows = measure()
            for part in rows if isinstance(rows, Iterator) else (rows,):
                keep(name, part)
    others = [asked for asked in flags.peer if asked != "torch"]
    if "race" in flags.sections:
        for row in libraries.race(others, flags.data_dir):
            keep("race", [row])
    elif others:
        steps = libraries.LENGTHS[:1] if flags.quick else libraries.LENGTHS
        keep("libraries", libraries.compare(others, steps, 2 if flags.quick else 5))
    if "torch" in flags.peer:
        from benchmarks import peer

        lengths = (5,) if flags.quick else (30, 100)
        keep("agreement", peer.agreement(lengths[:1]))
        repeats = 2 if flags.quick else max(scope.repeats, 10)
        keep("peer", peer.compare(lengths, repeats, others=1 if flags.quick else 3))
    print(f"[{time.perf_counter() - began:6.0f} s] written to {flags.out}")
    print(report.table(results["targets"]))
    return results


def _measure_gpu(flags: argparse.Namespace, results: dict[str, Any], keep: Callable[[str, Any], None]) -> None:
    """Measures what a GPU does, the peer at last, where it is installed."""
    from benchmarks import gpu

    results["machine"] |= gpu.about()
    peaks = gpu.measure_peaks(flags.quick)
    keep("gpu_peaks", gpu.rows_of(peaks))
    for rows in gpu.measure_steps(peaks, quick=flags.quick):
        keep("gpu", rows)
    if not libraries.missing("torch") and not flags.quick:
        from benchmarks import peer

        keep("peer", peer.compare((5, 30), repeats=5, others=1))


if __name__ == "__main__":
    mpisjax_launch.with_large_pages()
    with report_user_errors():
        main()
