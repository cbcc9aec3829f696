"""Libraries beside ours: who is missing is said, ratios are taken at the same T, and each takes a real step."""

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import libraries, report


def row(who, steps, seconds, mib):
    return {"who": libraries.TITLES[who], "T": steps, "seconds": seconds, "peak_MiB": mib}


def test_a_library_that_is_not_installed_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        command.main(["--only", "peer", "--peer", "spyx"])
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: --peer spyx needs spyx, which is not installed: pip install spyx\n"


def test_ratios_are_taken_at_the_same_number_of_steps_and_judged():
    ours = [row("rates", "", 0.1, 400), row("few", "", 0.05, 400), row("spikes", 30, 0.4, 500)]
    ours.append(row("bptt", 30, 1.0, 2000))
    *_, snntorch, spyx = libraries.beside_ours([*ours, row("snntorch", 30, 2.0, 4000), row("spyx", 30, 9.0, 6000)])
    columns = ("time / rates, 4 + 4", "time / rates, 3 + 1", "time / spikes", "time / through time", "memory / spikes")
    assert [snntorch[k] for k in columns] == [20, 40, 5, 2, 8]
    judged = {r["what"]: (r["measured"], r["met"]) for r in report.targets({"libraries": [snntorch, spyx]})}
    assert judged == {
        "T = 30: snnTorch's time / ours by rates, 4 + 4 solver steps": (20, "no"),
        "T = 30: snnTorch's time / ours by rates, 3 + 1 solver steps": (40, "yes"),
        "T = 30: snnTorch's time / ours by spikes": (5, "no"),
        "T = 30: the leanest library's memory / ours by spikes": (8, "no"),
    }


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "batch.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    np.savez(path, images=images, labels=np.arange(4, dtype=np.int32))
    return str(path)


@pytest.mark.parametrize("who", ["few", *libraries.LIBRARIES])
def test_a_process_of_its_own_takes_steps_and_tells_its_peak_of_memory(who, batch):
    if who in libraries.LIBRARIES:
        pytest.importorskip(who, reason="a benchmark-only extra, not installed")
    found = libraries.run(who, 2, batch, 1)
    assert found["who"] == libraries.TITLES[who] and found["T"] == ("" if who == "few" else 2)
    assert 0 < found["seconds"] < 600 and 0 < found["loss"] < 10
    assert 50 < found["peak_MiB"] < 4000


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rates", "bptt", "snntorch", "spikingjelly"])  # Spyx takes minutes
def test_a_race_ends_at_its_goal(who, tmp_path):
    if who in libraries.LIBRARIES:
        pytest.importorskip(who, reason="a benchmark-only extra, not installed")
    images = np.zeros(
        (256, 28, 28), np.uint8
    )  # two classes that a hundred steps tell apart: the left half, the right half
    labels = np.arange(256) % 2
    images[labels == 0, :, :14], images[labels == 1, :, 14:] = 255, 255
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=labels, held_out=images[:20], held_out_labels=labels[:20])
    found = libraries.run(who, 2, str(path), 0.9)
    assert found["who"] == libraries.TITLES[who] and found["steps"] % 100 == 0 and found["accuracy, %"] >= 90
    assert 0 < found["seconds"] < 600 and found["T"] == 2
