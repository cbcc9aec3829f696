"""What the command line of the export takes and refuses."""

from __future__ import annotations

import pytest

from mpisjax.export.__main__ import arguments

NIR = ["--pretrained", "digits", "--format", "nir", "--out", "digits.nir"]
STABLEHLO = ["--pretrained", "digits", "--format", "stablehlo", "--out", "digits.stablehlo"]


def test_todays_call_means_image_to_class_in_float():
    given = arguments(NIR)
    assert (given.stem, given.head, given.neurons, given.weights) == ("spikes", "spikes", "exact", "float32")
    assert (given.unrolled, given.check, given.cost, given.finetune) == (None, None, False, None)
    assert arguments([*NIR, "--check"]).check == 256
    assert arguments([*NIR, "--check", "10"]).check == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*STABLEHLO, "--check"], "--check is for --format nir"),
        ([*STABLEHLO, "--weights", "int8"], "--weights is for --format nir"),
        ([*NIR, "--batch_size", "3"], "--batch_size is for --format stablehlo"),
        ([*NIR, "--unrolled", "2", "--weights", "int8"], "--unrolled stands alone"),
        ([*NIR, "--finetune", "2"], "--finetune is for --weights int8 or int4"),
        ([*NIR, "--weights", "int2"], "int2"),
        ([*NIR, "--check", "0"], "--check"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as refused:
        arguments(options)
    assert refused.value.code == 2 and words in capsys.readouterr().err
