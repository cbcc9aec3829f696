"""The program starts once more with large pages, and only once."""

import os
import subprocess
import sys

import pytest

PROGRAM = (
    "import mpisjax_launch, os, sys; mpisjax_launch.with_large_pages(); "
    "print(os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:])"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="large pages are asked for on Linux alone")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("glibc.malloc.perturb=0", "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"),
    ],
)
def test_starts_itself_once_more_with_its_arguments(before, after):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if before is None else {"GLIBC_TUNABLES": before}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a b", "--c"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [after, "a", "b", "--c"]
