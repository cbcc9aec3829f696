"""Peak memory: what it counts, and from when."""

import json

import pytest

PROGRAM = """
import json
from benchmarks.resident import forget_peak, peak_mib
found = [peak_mib()]
block = b"x" * (100 << 20)
found.append(peak_mib())
del block
found.append(peak_mib())
forget_peak()
found.append(peak_mib())
print(json.dumps([value - found[0] for value in found[1:]]))
"""


def test_the_peak_of_memory_is_what_was_touched_since_it_was_last_forgotten(python):
    """In a process of its own, whose peak is what it holds: here it may lie far above that."""
    done = python("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    held, gone, forgotten = json.loads(done.stdout)
    assert 95 < held < 120 and gone == pytest.approx(held, abs=2)
    assert forgotten < 20


@pytest.mark.slow
def test_training_tells_its_peak_in_each_phase(python):
    done = python("-m", "benchmarks.footprint", "digits", "train", "", XLA_FLAGS="")  # as users compile
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    phases = [row[name] for name in ("import", "data", "compile", "steps", "validation")]
    assert row["peak_MiB"] == max(phases) and min(phases) == row["import"] > 50
    assert row["parameters"] == 52690 and 0 < row["temporary_MiB"] < 50
    # What compiling left has been given back: a step of this network takes some MiB.
    assert row["steps"] < row["compile"] - 50
