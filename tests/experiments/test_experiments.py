"""The experiments' own logic, one of them from end to end, and the memory that Table 1 reports."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import __main__ as program
from experiments import tables
from experiments.catalog import EXPERIMENTS, document
from experiments.paper import reported, table1
from experiments.rows import Rows
from experiments.scales import NAMES, scale_of
from experiments.study import Study, described
from mpisjax.configuration import config_files
from mpisjax.neurons import IF
from mpisjax.nn import MPIS, model
from mpisjax.storage.preemption import Stopper

pytestmark = pytest.mark.unoptimized


def tiny(net, **more):
    """A network small enough for a test; most digits held out, so that an epoch is one step."""
    settings = {"model.stem": (3,), "model.layers": (4, 5), "train.epochs": 1, "train.warmup_epochs": 0.0}
    return net._replace(settings={**net.settings, **settings, "data.num_validation": 1350, **more})


def every_net(scale):
    nets = {net.name: net for name in EXPERIMENTS for net in EXPERIMENTS[name].nets(scale)}
    return list(nets.values())


@pytest.mark.parametrize("name", NAMES)
def test_command_trains_what_the_experiment_trains(name):
    for net in every_net(scale_of(name)):
        file, *overrides = net.command(seed=3).removeprefix("python train.py --config ").split(" ")
        config = config_files.apply_overrides(config_files.load_config(file), [o.replace('"', "") for o in overrides])
        assert config.to_dict() == net.load(seed=3).to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_compared_networks_are_of_equal_size(name):
    from tests.configs.test_configs import parameters_of

    scale = scale_of(name)
    for pair in (scale.through_time[0], *scale.single_stream, scale.convergence):
        ours, other = (parameters_of(net.load()) for net in pair)
        assert other == pytest.approx(ours, rel=0.01)
        assert pair.ours.steps == pair.other.steps
        assert pair.ours.load().train.epochs == pair.other.load().train.epochs
    if name != "smoke":
        first, *others = (parameters_of(net.load()) for net in scale.fair)
        assert others == [pytest.approx(first, rel=0.01)] * len(others)


def test_names_of_runs_are_unique():
    for name in NAMES:
        settings = {}
        for experiment in EXPERIMENTS:
            for net in EXPERIMENTS[experiment].nets(scale_of(name)):
                assert settings.setdefault(net.name, net.settings) == net.settings


def test_a_row_is_computed_once_and_again_when_its_settings_change(tmp_path):
    path, calls = tmp_path / "a" / "results.json", []

    def compute(value):
        calls.append(value)
        return {"value": value}

    header = {"experiment": "e", "scale": "smoke", "seeds": [0]}
    rows = Rows(path, header, Stopper())
    assert rows.row("one", {"lr": 1}, lambda: compute(1)) == {"value": 1}
    with pytest.raises(RuntimeError):
        rows.row("two", {}, lambda: (_ for _ in ()).throw(RuntimeError("interrupted")))
    again = Rows(path, header, Stopper())  # another process, after the interruption
    assert again.row("one", {"lr": 1}, lambda: compute(2)) == {"value": 1}
    assert again.row("two", {}, lambda: compute(3)) == {"value": 3}
    assert Rows(path, header, Stopper()).row("one", {"lr": 2}, lambda: compute(4)) == {"value": 4}
    assert calls == [1, 3, 4]
    last = Rows(path, {**header, "seeds": [0, 1]}, Stopper())
    last.row("two", {}, lambda: compute(5))
    assert set(last.finish()["rows"]) == {"two"} and json.loads(path.read_text())["seeds"] == [0, 1]


def test_each_seed_may_have_a_command_of_its_own(tmp_path):
    net = tiny(scale_of("smoke").firing[0])

    def after(seeds, net=net):
        study = study_of(tmp_path, scale_of("smoke")._replace(seeds=seeds))
        rows = study.rows("fair", nets=[described(net)])
        study.seed_rows(rows, net, lambda seed: {"value": seed})
        return rows.finish()

    after((2,))
    content = after((0,))
    assert content["seeds"] == [0, 2] and [r["value"] for r in tables.of_seeds(content, net.name)] == [0, 2]
    other = net._replace(settings={**net.settings, "train.epochs": 2})  # rows of other settings do not stay
    assert after((1,), other)["seeds"] == [1]


@pytest.mark.slow
def test_a_network_is_tested_after_several_numbers_of_steps(tmp_path):
    net = tiny(scale_of("smoke").fair[0], **{"forward.num_steps": 2})
    found = study_of(tmp_path, scale_of("smoke")).tested(net, (1, 3), 0)
    assert [test["num_steps"] for test in found["tests"]] == [1, 3] and found["parameters"] > 0
    assert all(0 < test["accuracy"] <= 1 and test["synops"] > 0 for test in found["tests"])


def test_a_fit_tells_lines_from_curves():
    steps = [1, 10, 30, 100]
    slope, offset, r_squared = table1.fit(steps, [5 + 2 * t for t in steps])
    np.testing.assert_allclose([slope, offset, r_squared], [2, 5, 1])
    assert table1.fit(steps, [t**2 for t in steps])[2] < 0.99
    assert table1.fit(steps, [7, 7, 7, 7])[2] == 1 and table1.growth([7, 7]) == 0
    assert table1.growth([100, 103]) == pytest.approx(0.03)


def study_of(tmp_path, scale):
    # Not the main thread's signals: the stopper of a test listens to nobody.
    assert threading.current_thread() is threading.main_thread()
    return Study(scale, tmp_path, "", Stopper(), timing=False)


@pytest.mark.slow
def test_an_experiment_from_end_to_end_and_again(tmp_path, monkeypatch):
    net = tiny(scale_of("smoke").firing[0], **{"forward.num_steps": 3})._replace(steps=3)
    scale = scale_of("smoke")._replace(firing=(net,), examples=50)
    table2 = EXPERIMENTS["table2"]
    content = table2.run(study_of(tmp_path, scale))
    page = document(table2, content)
    assert "| stream2/layer2 | no row | " in page and "50 test examples" in page and "epochs: 1, seed 0" in page
    assert "    python -m experiments table2 --scale smoke\n" in page
    found = tables.of_seeds(content, net.name)[0]
    assert found["num_steps"] == 3 and found["num_examples"] == 50
    assert any(rate > 0 for rate in found["firing_rates"].values())
    tables.save_figures(table2.draw(content), tmp_path / "figures")
    assert {p.suffix for p in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
    # Nothing is trained or measured twice.
    monkeypatch.setattr(Study, "train", None)
    assert table2.run(study_of(tmp_path, scale)) == content


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "fig3", "table4", "fair", "audit", "warm", "solves"])
def test_a_table_without_results_says_so_and_shows_the_paper_s_values(name):
    scale = scale_of("paper")
    content = {"experiment": name, "scale": "paper", "seeds": [0], "rows": {}, "memory_steps": [1, 2, 3]}
    content["pairs"] = [[described(net) for net in pair] for pair in scale.through_time]
    content["nets"] = [described(net) for net in EXPERIMENTS[name].nets(scale)]
    if name == "table3":
        content["pairs"] = [[described(net) for net in pair] for pair in scale.single_stream]
    page = EXPERIMENTS[name].render(content)
    assert tables.MISSING in page
    if name in ("table1", "table3", "table4"):
        assert reported.UNKNOWN in page
    assert not EXPERIMENTS[name].draw(content)


def test_the_audit_names_every_layer_of_a_network_in_words():
    net = MPIS(10, stem=(3, 3), stem_strides=(1, 1), layers=(4, 4, 4), num_streams=3)
    shapes = jax.eval_shape(lambda x: model.init_variables(net, jax.random.key(0), x, IF()), jnp.zeros((1, 8, 8, 1)))
    named = {name: EXPERIMENTS["audit"].in_words(name)[1] for name in shapes["params"]}
    assert named["feb_0_0"] == "stream 1, layer 2" and named["down_2_0_1"] == "fusion, stream 1 to 3, convolution 2"
    assert len(set(named.values())) == len(named) and not any("_" in words for words in named.values())


@pytest.mark.slow
def test_warm_starts_count_evaluations_of_a_known_solve(tmp_path):
    curve = [0.5**k for k in range(1, 61)]  # the residual halves: 0.3, 0.1 and 0.02 lie between two of them
    assert EXPERIMENTS["warm"].needed(curve, 0.25) == 2.0
    assert EXPERIMENTS["warm"].needed(curve, 0.3) == pytest.approx(np.log2(1 / 0.3))
    assert EXPERIMENTS["warm"].needed(curve, 0.6) == 1.0 and EXPERIMENTS["warm"].needed(curve, 0.0) is None
    net = tiny(scale_of("smoke").audited, **{"forward.num_steps": 3})._replace(steps=3)
    scale = scale_of("smoke")._replace(audited=net, followed=8)
    content = EXPERIMENTS["warm"].run(study_of(tmp_path, scale))
    curves = tables.of_seeds(content, net.name)[0]["curves"]
    assert curves["zeros"][0] == pytest.approx(1.0)  # ||f(0) - 0|| / ||f(0)||
    assert curves["mean"][0] < 0.9 and curves["zeros"][-1] < 1e-3 and curves["mean"][-1] < 1e-3
    page = document(EXPERIMENTS["warm"], content)
    assert "The warm start saves" in page and "evaluations to 0.1" in page
    assert set(EXPERIMENTS["warm"].draw(content)) == {"residual"}


def test_solves_are_measured_once_and_shown_with_their_settings(tmp_path, monkeypatch):
    solves, asked = EXPERIMENTS["solves"], []

    def measure(study, name, samples, pairs):
        asked.append((name, samples))
        return {"solves": [[0.1 * i, 0.5, 1.25] for i, _ in enumerate(pairs)]}

    monkeypatch.setattr(solves, "measure", measure)
    for _ in range(2):
        content = solves.run(study_of(tmp_path, scale_of("smoke")._replace(followed=8)))
    assert asked == [("digits", 32)]
    page = document(solves, content)
    second = "| picard, 4 | 0 | neumann, 4 | 0 | 0.100 | 0.500 | 1.25 |"
    assert second in page and "32 training images" in page and "nothing trained" in page
    assert set(solves.draw(content)) == {"cosine"}


def test_paper_s_values_are_those_of_the_issue_and_no_others():
    assert reported.accuracy("Fashion-MNIST", "MPIS, implicit", 30) == "93.14"
    assert reported.accuracy("Fashion-MNIST", "the same network, BPTT", 30) == reported.UNKNOWN
    assert reported.accuracy("digits", "MPIS, implicit", 30) == reported.NO_ROW


def test_seeds_are_summarised():
    assert tables.across_seeds([0.91, 0.93], factor=100) == "92.00 ± 1.41"
    assert tables.across_seeds([0.5]) == "0.50"
    assert tables.across_seeds([]) == tables.MISSING
    assert tables.across_seeds([0.5, None]) == "not finite"


def test_plan_counts_the_steps(capsys):
    program.main(["table3", "--scale", "small", "--dry_run", "--epochs", "3", "--seeds", "0,1"])
    said = capsys.readouterr().out
    assert "1,287 steps  fashion_mnist_fair_two, seed 1: python train.py" in said
    assert said.strip().endswith("5,148 steps in all")  # 2 networks x 2 seeds x 3 epochs x 429


def test_command_beside_a_table_has_the_flags_that_matter():
    flags = program.arguments(
        [
            "table1",
            "--scale",
            "small",
            "--data_dir",
            "/data",
            "--epochs",
            "3",
            "--num_steps",
            "30",
            "--out",
            "x",
        ]
    )
    assert program.shown_flags(flags) == " --data_dir DIR --epochs 3 --num_steps 30"


@pytest.mark.parametrize(
    "flags, word",
    [
        (["table1", "--seeds", "one"], "--seeds"),
        (["table1", "--scale", "small", "--num_steps", "31"], "choose among 4, 30"),
        (["table1", "--epochs", "3"], "--epochs"),
        (["table1", "--epochs=five", "--scale", "small"], "--epochs: 'five' is not a whole number"),
        (["table9"], "table9"),
        (["table1", "--data-dir", "x"], "did you mean --data_dir?"),
        (["table1", "--check"], "--check are for docs"),
    ],
)
def test_mistyped_flags_are_told_in_one_sentence(flags, word, capsys):
    with pytest.raises(SystemExit) as left:
        program.main(flags)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and word in said and len(said.strip().splitlines()) == 1


def test_a_folder_without_results_is_told_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as left:
        program.main(["docs", "--take", "/nonexistent"])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--take" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("scale", "ours", "other", "said"),
    [
        (
            "small",
            [0.90, 0.91, 0.92],
            [0.80, 0.81, 0.82],
            "MPIS beats BPTT at equal T (+10.00 points, standard error 0.82)",
        ),
        (
            "small",
            [0.80, 0.81, 0.82],
            [0.90, 0.91, 0.92],
            "MPIS does not beat BPTT at equal T (-10.00 points",
        ),
        ("small", [0.90, 0.91, 0.92], [0.89, 0.91, 0.92], "no difference shown between MPIS and BPTT"),
        ("paper", [0.9, 0.9], [0.1, 0.1, 0.1], "MPIS and BPTT are not compared, because that takes 3 seeds of each"),
        ("smoke", [0.90, 0.91, 0.92], [0.80, 0.81, 0.82], ""),
    ],
)
def test_a_verdict_needs_three_seeds_and_two_standard_errors(scale, ours, other, said):
    found = tables.verdict({"scale": scale}, "digits", ("MPIS", "BPTT"), "T", (ours, other))
    assert said in found if said else found == ""
