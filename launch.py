"""What has to be settled before the interpreter starts: large pages for the memory of a step.

A training step takes tens of megabytes of working memory and gives them back, so a CPU spends a sixth of the
step on page faults and misses of its address cache. The C library asks for large pages when it is told to,
but only as the program starts: so the program starts itself once more. Results do not change.
"""

from __future__ import annotations

import os
import sys

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
