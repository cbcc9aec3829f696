"""How the programs start: what has to be settled before JAX is imported, which takes a while.

A training step takes tens of megabytes of working memory and gives them back, so a CPU spends a sixth of the
step on page faults and misses of its address cache. The C library asks for large pages when it is told to,
but only as the program starts: so the program starts itself once more. Results do not change.

This module stands beside the package `mpisjax`, because importing anything of the package imports JAX.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

_TUNABLE = "glibc.malloc.hugetlb"


def with_large_pages() -> None:
    """Starts this program again with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, unless that is set, to 1 or to 0.

    To be called before anything is imported that takes long. No effect outside Linux, under another C
    library, or where the kernel's transparent_hugepage is "never".
    """
    set_before = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or _TUNABLE in set_before or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (set_before, f"{_TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program `mpisjax`.

    Args:
        arguments: The command line without the program's name; this process's own by default.
    """
    with_large_pages()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["train"]:
        for number in (signal.SIGTERM, signal.SIGINT):  # until training itself listens
            signal.signal(number, _leave)
    else:  # an exception would be lost in the imports of others: some turn it into another one, some go on
        signal.signal(signal.SIGINT, _interrupt)
    from mpisjax.cli.main import main as run

    run(given)


def _interrupt(number: int, frame: Any) -> None:
    """Ends a program that has nothing to save."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _leave(number: int, frame: Any) -> None:
    """Ends the program in good order while nothing has begun, or everything is over."""
    os.write(2, f"stopped by {signal.Signals(number).name}; run the same command to go on\n".encode())
    with contextlib.suppress(RuntimeError, OSError):
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
