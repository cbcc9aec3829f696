"""Measures time, memory and solver steps, in one run; writes results.json, results.md and plots.

    python -m benchmarks                                  # everything on this machine's devices, about 10 minutes
    python -m benchmarks --quick                          # a look, under two minutes
    python -m benchmarks --only steps,memory --out DIR
    python -m benchmarks --peer torch                     # also beside PyTorch (pip install torch)

Sections: peaks, steps, memory, adjoint, scaling, solvers, profile, loader. Times are medians; processor seconds count every
thread. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import launch

SECTIONS = ("peaks", "steps", "memory", "adjoint", "scaling", "solvers", "profile", "loader")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sections, separated by commas; all by default")
    parser.add_argument("--out", default="benchmark_results", type=Path, help="folder for the results")
    parser.add_argument("--data_dir", default="", help="of the loader section: data sets' files or folders")
    parser.add_argument("--quick", action="store_true", help="fewer points and repeats")
    parser.add_argument("--peer", choices=["torch"], help="also measure the PyTorch peer")
    parser.add_argument("--repeats", type=int, default=0, help="most timed calls of a point (10; quick: 3)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of currents and rates"
    )
    parser.add_argument("--one_core", action="store_true", help="on a CPU, keep to one core")
    flags = parser.parse_args(argv)
    flags.sections = tuple(s for s in flags.only.split(",") if s) or SECTIONS
    if unknown := set(flags.sections) - {*SECTIONS, "peer", "none"}:
        parser.error(f"--only names {', '.join(sorted(unknown))}: choose among {', '.join(SECTIONS)}, peer")
    if "peer" in flags.sections:
        flags.peer = "torch"
    return flags


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and writes; returns the results."""
    flags = arguments(argv)
    if flags.peer:
        try:
            import torch  # noqa: F401
        except ImportError:
            sys.exit("benchmarks: --peer torch needs PyTorch, which is not installed: pip install torch")
    from mpisjax.cpu import cores

    cores.prepare(all_cores=not flags.one_core)

    from benchmarks import arrangements, peaks, report, sections
    from benchmarks.machine import machine

    scope = sections.Scope(
        quick=flags.quick,
        repeats=flags.repeats or (3 if flags.quick else 10),
        budget=2.0 if flags.quick else 8.0,
        dtype=flags.dtype,
    )
    today = datetime.date.today().isoformat()
    about = {**machine(), "dtype": flags.dtype, "quick": flags.quick, "date": today}
    results: dict[str, Any] = {"machine": about}
    began = time.perf_counter()

    def done(name: str, rows: Any) -> None:
        results[name] = rows
        report.write(results, flags.out)  # after every section: what was measured is kept, whatever comes
        print(f"[{time.perf_counter() - began:6.0f} s] {name}", flush=True)
        if isinstance(rows, dict):
            for title, part in rows.items():
                print(f"\n{title}\n{report.table(part)}")
        else:
            print(report.table(rows), flush=True)

    wanted = flags.sections
    if {"peaks", "steps"} & set(wanted):
        done("peaks", sections.measure_peaks(scope))
    if "steps" in wanted:
        rows = results["peaks"]
        peak = peaks.convolution_peak([peaks.Peak(r["what"], r["GFLOP/s"]) for r in rows])
        done("steps", sections.measure_steps(scope, peak))
    if "memory" in wanted:
        done("memory", sections.measure_memory(scope))
    if "adjoint" in wanted:
        done("adjoint", sections.measure_adjoint(scope))
    if "scaling" in wanted:
        done("scaling", sections.measure_scaling(scope) + arrangements.measure(scope))
    if "solvers" in wanted:
        done("solvers", sections.measure_solvers(scope))
    if "profile" in wanted:
        done("profile", sections.measure_profile(scope))
    if "loader" in wanted:
        from benchmarks import loader

        done("loader", loader.measure(flags.data_dir, quick=flags.quick))
    if flags.peer:
        from benchmarks import peer

        lengths = (5,) if flags.quick else (30, 100)
        done("agreement", peer.agreement(lengths[:1]))
        repeats = 2 if flags.quick else max(scope.repeats, 10)
        done("peer", peer.compare(lengths, repeats, others=1 if flags.quick else 3))
    print(f"[{time.perf_counter() - began:6.0f} s] written to {flags.out}")
    print(report.table(results["targets"]))
    return results


if __name__ == "__main__":
    launch.with_large_pages()
    main()
