"""What `python -m benchmarks --gpu` would measure, tried on this machine with a tiny network."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as command
from benchmarks import gpu, report
from benchmarks.machine import machine


def test_all_rows_are_planned_the_most_telling_first():
    points = [(g.precision.title, g.network, g.batch_size, mode) for g in gpu.groups() for mode in g.modes]
    assert len(set(points)) == len(points) == 3 * 3 * 5
    assert {p[1:3] for p in points} == {("fashion", 128), ("cifar100", 128), ("cifar100", 512)}
    assert {p[3] for p in points} == {1, 5, 30, 100, "rates"}
    assert points[0] == ("float32, TF32 on", "fashion", 128, "rates")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--gpu"])
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --gpu needs a GPU") and "--quick" in told and told.count("\n") == 1


def test_the_least_time_of_products_is_that_of_arithmetic_or_of_memory():
    def product(a, b):
        return jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=3)[0]

    jaxpr = jax.make_jaxpr(product)(jnp.zeros((8, 8)), jnp.zeros((8, 8))).jaxpr
    operations, moved = 2 * 8**3, 3 * 8 * 8 * 4
    assert gpu.Roofline([], 10.0, 1e9).count(jaxpr) == pytest.approx(3 * operations / 10)
    assert gpu.Roofline([], 1e9, 10.0).count(jaxpr) == pytest.approx(3 * moved / 10)


def test_rows_are_written_as_they_come_and_what_was_not_reached_is_said(tmp_path, monkeypatch):
    tiny = gpu.groups(quick=True)[0]
    monkeypatch.setattr(gpu, "groups", lambda quick: [tiny])
    peaks = gpu.measure_peaks(quick=True)
    (rows,), (late,) = (next(gpu.measure_steps(peaks, quick=True, seconds=s)) for s in (1000, -1))
    assert rows["precision"] == "float32, TF32 on" and rows["batch"] == 2 and rows["forward"] == "rates"
    assert min(rows[key] for key in ("of_peak", "of_roofline", "temporary_MiB")) > 0
    assert rows["images/s"] == pytest.approx(2 / rows["seconds"])
    assert late["seconds"] == "not reached"
    report.write({"machine": machine() | gpu.about(), "gpu_peaks": gpu.rows_of(peaks), "gpu": [rows, late]}, tmp_path)
    assert [r["seconds"] for r in json.loads((tmp_path / "results.json").read_text())["gpu"]][1] == "not reached"
    assert "## Training steps on the GPU" in (tmp_path / "results.md").read_text()
