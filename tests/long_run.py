"""Trains for a long time and makes sure that nothing grows: resident memory, compiled programs, open files, arrays.

    python tests/long_run.py [--steps 20000] [--every 250] [--workdir DIR] [--config FILE] [--config.KEY=VALUE]

runs the default config for so many steps, as `train.py` would (validation and a checkpoint each epoch included),
and takes a sample every 250 steps (--every). Every second is printed. The exit code is 1 if, over the last 90% of the
steps, the median of memory over a tenth of the run moved by more than 1%, anything was compiled, or open files, threads
or live arrays grew. What the allocator holds back of freed memory, hundreds of megabytes at times, is given back to the
system before a sample is taken: it goes up and down by itself. So does what it cannot give back, the pages that are not
quite empty, where every thread has an arena of its own; this script starts itself anew with one arena for all. Linux
with glibc 2.33 or later only: it reads /proc and asks malloc.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package may be this checkout

from mpisjax import cli  # noqa: E402
from mpisjax.cli.arguments import Parser, path, whole_number  # noqa: E402
from mpisjax.configuration.config_files import load_config  # noqa: E402
from mpisjax.storage.preemption import watch  # noqa: E402

SHOWN_EVERY = 2
SETTLED = 0.1  # of the run: what comes before may grow
TOLERANCE = 0.01  # of resident memory, after that


def arguments() -> Parser:
    """The program's flags."""
    parser = Parser("tests/long_run.py", __doc__, with_config=True)
    number = whole_number(1)
    parser.add_argument("--steps", type=number, default=20_000, help="steps to take, at least; epochs are not cut")
    parser.add_argument("--every", type=number, default=250, help="steps from one sample to the next")
    parser.add_argument("--workdir", type=path, help="folder of the run; a temporary one by default")
    return parser


class Sample(NamedTuple):
    """What the process holds at one moment.

    Attributes:
        step: Steps taken.
        anonymous: Resident memory of its own, swapped out or not, KiB: what it allocated, and not the files that
            the kernel maps in and drops as it likes.
        resident: All resident memory, KiB; for show.
        allocated: What malloc has given out and not got back, KiB; for show. It tells what a program holds from what
            the allocator and the kernel make of it.
        files: Open file descriptors.
        threads: Threads of the process.
        compiled: Programs compiled since the process began.
        cached: Entries in the training step's own cache of compiled programs.
        arrays: Live JAX arrays.
    """

    step: int
    anonymous: int
    resident: int
    allocated: int
    files: int
    threads: int
    compiled: int
    cached: int
    arrays: int


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def memory() -> tuple[int, int, int]:
    """(anonymous, resident, allocated) memory of this process, KiB, once what was freed has been given back."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {fields[0]: int(fields[1]) for fields in lines if fields and fields[0].startswith(("Rss", "Vm"))}
    return sizes["RssAnon:"] + sizes["VmSwap:"], sizes["VmRSS:"], (info.uordblks + info.hblkhd) // 1024


def tenths(values: list[int], count: int = 9) -> list[int]:
    """Medians of `count` equal parts: garbage comes and goes within each."""
    edges = [len(values) * n // count for n in range(count + 1)]
    return [int(statistics.median(values[a:b])) for a, b in itertools.pairwise(edges) if b > a]


def problems(samples: list[Sample]) -> list[str]:
    """What has grown after the first tenth of the samples, a sentence each."""
    settled = samples[int(SETTLED * len(samples)) :]
    told = []
    held = tenths([sample.anonymous for sample in settled])
    moved = max(held) / min(held) - 1
    if moved > TOLERANCE:
        told.append(f"memory moved by {100 * moved:.2f}%: {held} KiB, medians of each tenth")
    for name in ("compiled", "cached"):
        counts = [getattr(sample, name) for sample in settled]
        if counts[-1] != counts[0]:
            told.append(f"{name}: {counts[0]} programs became {counts[-1]}")
    for name in ("files", "threads", "arrays"):
        counts = [getattr(sample, name) for sample in settled]
        half = len(counts) // 2
        if half and max(counts[half:]) > max(counts[:half]):  # they go up and down within an epoch
            told.append(f"{name}: at most {max(counts[:half])} in the first half, {max(counts[half:])} after")
    return told


def main(given, config) -> int:
    """Runs, samples and judges."""
    from mpisjax.configuration.makers import prepare_cores

    with watch() as stopper, tempfile.TemporaryDirectory() as temporary:
        prepare_cores(config)
        import jax

        from mpisjax.configuration import makers
        from mpisjax.training import run

        compiled, samples, began = [0], [], time.monotonic()

        def count(event: str, duration: float, **more: object) -> None:
            del duration, more
            compiled[0] += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(count)
        make = makers.make_train_step

        def make_watched(*arguments, **settings):
            step = make(*arguments, **settings)
            taken = [0]

            def watched(state, batch):
                if taken[0] % given.every == 0:
                    # The step before this one may be at work still, and hold memory.
                    jax.block_until_ready(state)
                    samples.append(
                        Sample(
                            taken[0],
                            *memory(),
                            len(os.listdir("/proc/self/fd")),
                            len(os.listdir("/proc/self/task")),
                            compiled[0],
                            step._cache_size(),
                            len(jax.live_arrays()),
                        )
                    )
                    if len(samples) % SHOWN_EVERY == 1:
                        told = " ".join(f"{k}={v}" for k, v in samples[-1]._asdict().items())
                        print(f"{time.monotonic() - began:7.0f} s {told}", flush=True)
                taken[0] += 1
                return step(state, batch)

            watched.trace = step.trace  # what counts the arithmetic asks for it
            return watched

        makers.make_train_step = make_watched
        steps_per_epoch = run.assemble(config).feed.steps_per_epoch
        config.train.epochs = -(-given.steps // steps_per_epoch)
        result = run.run(config, given.workdir or temporary, stopper)
    told = problems(samples)
    held = [sample.anonymous for sample in samples[int(SETTLED * len(samples)) :]]
    print(
        f"{result.step} steps in {time.monotonic() - began:.0f} s, {len(samples)} samples; memory over the last 90%: "
        f"{min(held)} to {max(held)} KiB, medians of each tenth {tenths(held)}; last: {samples[-1]}"
    )
    for problem in told:
        print(f"GREW: {problem}")
    return int(bool(told) or result.stopped)


def with_one_arena() -> None:
    """Starts this program again as `mpisjax_launch.with_large_pages` does, and with one malloc arena for all
    threads.
    """
    before = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.arena_max" not in before:
        wanted = ("glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=1")
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (before, *wanted)))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    if not os.path.exists("/proc/self/status"):
        sys.exit("this script reads /proc, which only Linux has")
    with_one_arena()
    cli.run(main, arguments(), lambda given, file: load_config(file or ROOT / "configs" / "digits.py"))
