"""A few broken files for every reader; `fuzz.py` beside this tries as many as one likes."""

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tonic")
TARGETS = fuzz.targets()


@pytest.mark.parametrize("name", TARGETS)
def test_readers_refuse_or_read_right(name):
    target = TARGETS[name]
    broken = st.builds(
        lambda content, seed: fuzz.mutate(content, np.random.default_rng(seed)),
        st.sampled_from(target.seeds),
        st.integers(0, 2**32 - 1),
    )

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.one_of(broken, st.binary(max_size=300)))
    def check(content):
        fuzz.attempt(target.read, content)

    check()


def test_the_fuzzer_notices_what_is_wrong(monkeypatch, capsys):
    def careless(content):
        raise IndexError("out of range")

    monkeypatch.setattr(fuzz, "targets", lambda: {"N-MNIST": fuzz.Target([b"abc"], careless)})
    assert fuzz.main(10, 0) == 1
    assert "10 failures" in capsys.readouterr().out
