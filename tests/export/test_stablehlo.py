"""The StableHLO program: the same scores and spikes as ours, in a process that has nothing of mpisjax."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import mpisjax
from mpisjax import nn
from mpisjax.configuration import makers
from mpisjax.data import prepare_images
from mpisjax.export.__main__ import main

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
    import sys
    sys.path = [p for p in sys.path if p != {root!r}]
    import jax
    import numpy as np
    found = jax.export.deserialize(bytearray(open("net.stablehlo", "rb").read()))
    assert set(found.platforms) == {{"cpu", "cuda", "tpu"}}
    images = np.load("images.npy")
    for count in (len(images), 1):
        out = found.call(images[:count])
        assert out["scores"].shape == (count, 10) and out["num_steps"].shape == (count,)
        np.testing.assert_allclose(out["scores"].sum(-1), 1, rtol=1e-5)
        if count > 1:
            counts = {{f"count {{name}}": n for name, n in out.pop("spike_counts").items()}}
            np.savez("out.npz", **out, **counts)
    foreign = [m for m in sys.modules if m.split(".")[0] in ("mpisjax", "flax", "ml_collections", "jaxopt")]
    assert not foreign, foreign
"""


@pytest.mark.parametrize(
    ("name", "num_steps"), [("digits", 5), pytest.param("saccade_digits", None, marks=pytest.mark.slow)]
)
def test_it_runs_without_this_package(python, capsys, tmp_path, name, num_steps):
    trained = mpisjax.load_pretrained(name)
    images = np.asarray(makers.make_dataset(trained.config).validation.images[:20])
    steps = [] if num_steps is None else ["--num_steps", str(num_steps)]
    out = str(tmp_path / "net.stablehlo")
    main(["--pretrained", name, "--format", "stablehlo", "--out", out, *steps])
    assert "for cpu, cuda, tpu, batch size any" in capsys.readouterr().out
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM.format(root=str(ROOT))))
    done = python("-P", "program.py", cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    neuron = makers.make_neuron(trained.config)
    forward = makers.make_spike_forward(trained.config, trained.inputs.temporal, num_steps)
    x = prepare_images(images, trained.inputs)
    simulation = nn.spikes(trained.net, trained.variables, x, neuron=neuron, forward=forward)
    logits = trained.net.apply(trained.variables, simulation.rates, False, method="classify")
    # A current within rounding of the threshold may fire on one side alone, and feedback carries that on.
    wanted = np.asarray(jax.nn.softmax(logits))
    assert np.mean(np.abs(out["scores"] - wanted) < 1e-3) > 0.9
    assert np.array_equal(out["scores"].argmax(-1), wanted.argmax(-1))
    np.testing.assert_array_equal(out["num_steps"], simulation.num_steps)
    assert {key.removeprefix("count ") for key in out if key.startswith("count ")} == set(simulation.spike_counts)
    for population, spikes in simulation.spike_counts.items():
        total = np.asarray(spikes).reshape(len(images), -1).sum(1)
        assert out[f"count {population}"].dtype == np.int32
        np.testing.assert_allclose(out[f"count {population}"], total, rtol=0.01, atol=3)


@pytest.mark.slow
def test_the_command_writes_a_nir_file(capsys, tmp_path):
    nir = pytest.importorskip("nir", reason="the nir package is not installed: pip install nir")
    out = tmp_path / "digits.nir"
    main(["--pretrained", "digits", "--format", "nir", "--out", str(out)])
    assert "39 nodes" in capsys.readouterr().out and list(tmp_path.iterdir()) == [out]
    graph = nir.read(out)
    assert list(graph.output_type) == ["output"]
    assert json.loads(graph.metadata["about"]) == {"name": "digits", "num_steps": 16, "weights": "float32"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--pretrained nonsense --format nir", 1, "no pretrained network 'nonsense'"),
        ("--workdir nowhere --format stablehlo", 1, "there is no run and no network nowhere"),
        ("--pretrained saccade_digits --format stablehlo --num_steps 3", 1, "needs a constant input"),
        ("--pretrained digits --format nir --batch_size 3", 2, "for --format stablehlo"),
        (
            "--pretrained digits --format stablehlo --num_steps 0",
            2,
            "--num_steps: '0' is not a whole number of at least 1",
        ),
        ("--pretrained digits --format onnx", 2, "invalid choice: 'onnx'"),
        (
            "--pretrained digits --format nir --batch-size 3",
            2,
            "no flag --batch-size; did you mean --batch_size?",
        ),
        ("--format nir", 2, "--workdir --pretrained is required"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, arguments, code, words):
    with pytest.raises(SystemExit) as left:
        main([*arguments.split(), "--out", str(tmp_path / "file")])
    assert left.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
