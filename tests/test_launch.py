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


INTERRUPTED = """
import os, signal, sys, types, mpisjax_launch

def stop(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("somebody else's code takes the exception")

names = ("mpisjax", "mpisjax.cli", "mpisjax.cli.main")
sys.modules |= {name: types.ModuleType(name) for name in names}
sys.modules["mpisjax.cli.main"].main = stop
mpisjax_launch.main(["demo", "a.png"])
"""


def test_an_interrupt_while_a_program_starts_is_one_word():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
