"""The benchmarks' own arithmetic: counted operations, tables, and one small section from end to end."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import mpisjax
from benchmarks import __main__ as command
from benchmarks import loader, nets, report, sections, user
from benchmarks.machine import machine
from mpisjax.cpu import winograd
from mpisjax.data.augment import normalize
from mpisjax.nn import convolution, flops

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)


def test_counts_convolutions_and_products():
    x, w = jnp.zeros((2, 6, 5, 3)), jnp.zeros((3, 3, 3, 4))
    forward = 2 * (2 * 6 * 5 * 4) * (3 * 3 * 3)
    assert flops.count(convolve, x, w) == forward
    # Both gradients cost what the forward pass does; that one is computed too.
    assert flops.count(lambda x, w: jax.vjp(convolve, x, w)[1](convolve(x, w)), x, w) == 4 * forward
    assert flops.count(jnp.matmul, jnp.zeros((7, 5)), jnp.zeros((5, 3))) == 2 * 7 * 5 * 3


def test_what_counts_is_the_plain_form_whichever_a_platform_takes():
    x, w = jnp.zeros((2, 8, 8, 32)), jnp.zeros((3, 3, 32, 32))
    (map_,) = [e for e in jax.make_jaxpr(convolution.conv2d)(x, w).eqns if e.primitive.name == "convolution"]
    assert map_.params["on_cpu"] is not None
    # Beside the convolution only the transformation of its kernel, 6x6 from 3x3.
    kernels = flops.count(winograd.kernels, w)
    assert flops.count(convolution.conv2d, x, w) - kernels == flops.count(convolve, x, w)


def test_zeros_inserted_by_a_strided_transposition_are_not_counted():
    def transposed(g, w):
        return lax.conv_general_dilated(g, w, (1, 1), [(1, 2), (1, 2)], lhs_dilation=(2, 2), dimension_numbers=LAYOUT)

    g, w = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))
    assert transposed(g, w).shape == (1, 8, 8, 5)
    assert flops.count(transposed, g, w) == 2 * (8 * 8 * 5) * (3 * 3 * 3) / 4


def test_loops_count_as_often_as_they_run():
    w = jnp.zeros((4, 4))

    def scanned(x):
        return lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    def solved(x):
        # The first loop computes nothing that counts, and takes no trip count away from the second.
        n = lax.while_loop(lambda n: n < 3, lambda n: n + 1, 0)
        return lax.while_loop(lambda c: jnp.all(c < n), lambda c: c @ w, x)

    once = 2 * 4 * 4
    x = jnp.zeros((1, 4))
    assert flops.count(scanned, x) == 7 * once
    assert flops.count(solved, x, trips=[5]) == 5 * once
    with pytest.raises(ValueError, match="trip count"):
        flops.count(solved, x)


def test_a_linear_solve_counts_once():
    w = jnp.eye(4)

    def solved(b):
        def iterate(matvec, b):
            return lax.while_loop(lambda x: jnp.any(x < b), matvec, b)

        return lax.custom_linear_solve(lambda x: x @ w, b, iterate, iterate)

    assert flops.count(solved, jnp.ones((1, 4)), trips=[5]) == 5 * 2 * 4 * 4


@pytest.mark.slow
def test_measures_a_small_network_and_writes_it_down(tmp_path, monkeypatch):
    small = nets.case("f64c5", batch_size=4, layers=(2,))
    monkeypatch.setattr(sections, "subject", lambda scope, name: nets.Subject(small, warmup=1))
    monkeypatch.setattr(sections.Scope, "cases", ("f64c5",))
    monkeypatch.setattr(sections.Scope, "modes", (3, "rates"))
    scope = sections.Scope(quick=True, repeats=2, budget=0.0, dtype="float32")
    results = {
        "machine": machine(),
        "steps": sections.measure_steps(scope, peak=100.0),
    }
    report.write(results, tmp_path)

    rows = {(r["what"], r["forward"]): r for r in results["steps"]}
    spikes, rates = rows["training step", 3], rows["training step", "rates"]
    assert spikes["forward_steps"] == 3 and 1 <= rates["forward_steps"] <= 12
    assert all(r["seconds"] > 0 and r["GFLOP"] > 0 and r["compile_seconds"] > 0 for r in rows.values())
    # A simulation runs one convolution of 2 channels to 2 a step: so much less for inference at fewer steps.
    one = 2 * (4 * 28 * 28 * 2) * (25 * 2) / 1e9
    assert rows["inference", 3]["GFLOP"] > 3 * one
    assert spikes["GFLOP"] > rows["inference", 3]["GFLOP"]

    written = json.loads((tmp_path / "results.json").read_text())
    assert [r["forward"] for r in written["steps"]] == [3, 3, "rates", "rates"]
    text = (tmp_path / "results.md").read_text()
    assert "## Training steps and inference" in text and "F64C5, rates: share of the convolution peak" in text
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_targets_are_judged_from_what_was_measured():
    def row(who, forward, backward, seconds):
        return {"who": who, "forward": forward, "backward": backward, "seconds": seconds}

    peer = [
        row("mpisjax", "rates", "neumann", 1.0),
        row("mpisjax", 30, "neumann", 2.0),
        row("PyTorch", 30, "Broyden as IDE-FSNN", 6.0),
        row("PyTorch", 30, "Neumann, our tolerance", 1.0),
    ]
    judged = {r["what"]: (r["measured"], r["met"]) for r in report.targets({"peer": peer})}
    assert judged["F64C5, T = 30: times faster than the peer"] == (3.0, "yes")
    assert judged["F64C5, rates: times faster than the peer at T = 30"] == (6.0, "no")
    assert len(judged) == 2  # nothing is said of what was not measured


def test_quick_leaves_out_what_takes_minutes_unless_it_is_named():
    assert not {"scaling", "profile", "startup", "inference"} & set(command.arguments(["--quick"]).sections)
    assert command.arguments(["--quick", "--only", "scaling"]).sections == ("scaling",)
    assert command.arguments([]).sections == command.SECTIONS


def test_a_data_set_that_is_not_there_is_left_out_and_said_so(tmp_path, capsys):
    names = ("digits", "nmnist:subset", "nmnist:subset_low", "saccade_digits")
    assert list(loader.those_at_hand(names, str(tmp_path))) == ["digits", "saccade_digits"]
    said = [line.partition(" is left out: nmnist was not found") for line in capsys.readouterr().err.splitlines()]
    assert [name for name, found, _ in said if found] == list(names[1:3])


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        command.arguments(["--only", "steps,speed"])
    assert left.value.code == 2
    assert "speed" in capsys.readouterr().err


def test_answers_of_a_packaged_network_are_timed_and_are_its_own(monkeypatch):
    (digits,) = [n for n in user.available() if n == "digits"]
    rows = user.measure_inference([digits], quick=True, repeats=2)
    assert [(r["T or rates"], r["images"]) for r in rows] == [(m, n) for m in (1, 4, "rates") for n in (1, 100)]
    assert all(r["images/s"] == pytest.approx(1000 * r["images"] / r["ms"]) for r in rows)
    # The program that is timed gives the network's answers.
    trained = mpisjax.load_pretrained("digits")
    pixels = jax.random.randint(jax.random.key(1), (20, *trained.inputs.shape), 0, 256).astype(jnp.uint8)
    mean, std = trained.inputs.mean, trained.inputs.std
    found = user._answer(trained, "rates")(normalize(pixels, mean, std))
    assert found.shape == (20,) and set(found.tolist()) <= set(range(10))
    told = trained.predict(pixels, num_steps=200).classes
    assert sum(trained.classes[k] == t for k, t in zip(found.tolist(), told, strict=True)) >= 19


def test_validations_are_read_from_what_a_run_has_written_so_far(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert user.validations(path) == []
    rows = [{"kind": "train", "accuracy": 0.1}, {"kind": "validation", "accuracy": 0.9}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "valid')
    assert user.validations(path) == [0.9]
