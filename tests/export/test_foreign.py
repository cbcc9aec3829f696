"""The packaged digits network from image to class in nirtorch with snnTorch's neurons, and with Spyx's."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import mpisjax
from mpisjax.configuration import makers
from mpisjax.export import job, nir_host

nir = pytest.importorskip("nir", reason="the nir package is not installed: pip install nir")
TOOLS = {"with_nirtorch": ("nirtorch", "snntorch"), "with_spyx": ("spyx",)}


@pytest.fixture(params=list(TOOLS))
def tool(request):
    for package in TOOLS[request.param]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[export-test]'")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("images", [60, pytest.param(360, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1e-4),  # single precision: a current within rounding of the threshold may fire on one side alone
        ({"unrolled": 3}, 1e-4),
        ({"weights": "int8"}, 0),  # whole numbers have no rounding
    ],
)
def test_digits_from_image_to_class(tmp_path, tool, options, share, images):
    trained = mpisjax.load_pretrained("digits")
    chosen = job.Options(neurons="lif", num_steps=16, **options)
    nir.write(tmp_path / "digits.nir", job.graph_of(job.prepare(trained, chosen), chosen))
    pixels = np.asarray(makers.make_dataset(trained.config).test.images[:images])
    ours = nir_host.run(nir.read(tmp_path / "digits.nir"), pixels, 16)
    graph = nir.read(tmp_path / "digits.nir")
    scores, spikes = tool.run(graph, nir_host.encode(graph, pixels), 16)
    np.testing.assert_array_equal(scores.argmax(1), ours.scores.argmax(1))
    assert set(spikes) == set(ours.spikes)
    for name, count in spikes.items():
        differ = np.abs(count - ours.spikes[name]).sum()
        assert differ <= share * ours.spikes[name].sum(), name
