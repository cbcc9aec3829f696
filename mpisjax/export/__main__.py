"""Writes a trained network for other programs.

python -m mpisjax.export --pretrained digits --format stablehlo --out digits.stablehlo
python -m mpisjax.export --workdir runs/digits --format nir --out digits.nir --check
python -m mpisjax.export --workdir runs/digits --format nir --out digits.nir --weights int8 --check --cost
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, local_path, whole_number
from mpisjax.errors import UserError

OF_NIR = ("neurons", "stem", "head", "unrolled", "weights", "check", "cost", "finetune")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("python -m mpisjax.export", __doc__)
    named.add_network_arguments(parser)
    parser.add_argument("--format", required=True, choices=("nir", "stablehlo"), help="what to write")
    parser.add_argument("--out", required=True, type=local_path, help="file to write")
    parser.add_argument(
        "--num_steps",
        type=whole_number(1),
        help="time steps, of the program or of the check; as trained by default",
    )
    parser.add_argument("--batch_size", type=whole_number(1), help="stablehlo: the one batch size; any by default")
    parser.add_argument(
        "--neurons",
        choices=("exact", "lif"),
        default="exact",
        help="nir: exact nodes, or IF/LIF nodes that must be told to reset by subtraction",
    )
    for part in ("stem", "head"):
        parser.add_argument(
            f"--{part}",
            choices=("spikes", "host"),
            default="spikes",
            help=f"nir: the {part} as spiking neurons, or left to the host with its weights in the metadata",
        )
    parser.add_argument(
        "--initial_potential", type=float, metavar="U",
        help="nir: where neurons start, in thresholds; as trained by default",
    )  # fmt: skip
    parser.add_argument(
        "--unrolled", type=whole_number(1), help="nir: so many copies of the streams instead of feedback"
    )
    parser.add_argument(
        "--weights", choices=("float32", "int8", "int4"), default="float32",
        help="nir: integer weights make integer arithmetic",
    )  # fmt: skip
    parser.add_argument(
        "--finetune", type=whole_number(1), metavar="EPOCHS",
        help="nir: train the rounded weights for so many epochs, by rates; the run is kept in OUT.finetune",
    )  # fmt: skip
    parser.add_argument(
        "--check", nargs="?", const=256, type=whole_number(1), metavar="IMAGES",
        help="nir: run the file from image to class in an independent simulator, on so many test images (256)",
    )  # fmt: skip
    parser.add_argument("--cost", action="store_true", help="nir: estimate what it costs on Loihi 2")
    given = parser.parse_args(argv)
    if given.format == "nir" and given.batch_size:
        parser.error("--batch_size is for --format stablehlo; a NIR graph is stepped by its host")
    for name in (*OF_NIR, "initial_potential"):
        if given.format != "nir" and getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name} is for --format nir")
    if given.finetune and given.weights == "float32":
        parser.error("--finetune is for --weights int8 or int4")
    if given.unrolled and (given.check or given.cost or given.weights != "float32"):
        parser.error("--unrolled stands alone: leave out --check, --cost and --weights")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the file."""
    given = arguments(argv)
    with cli.report_user_errors():
        named.check_folder("--out", given.out)
        trained = named.network(given)
        if trained.inputs.temporal and given.num_steps:
            raise UserError("--num_steps needs a constant input; an event set takes as many steps as it has frames")
        write = _write_nir if given.format == "nir" else _write_stablehlo
        print(write(trained, given, given.out))


def _write_nir(trained: Any, given: argparse.Namespace, out: Path) -> str:
    from mpisjax.export.job import Options, export_nir

    steps = given.num_steps or trained.config.forward.num_steps
    options = Options(**{name: getattr(given, name) for name in OF_NIR}, num_steps=steps)
    if given.initial_potential is not None:
        neuron = dataclasses.replace(trained.neuron, initial_potential=given.initial_potential)
        trained = trained._replace(neuron=neuron)
    return export_nir(trained, options, out)


def _write_stablehlo(trained: Any, given: argparse.Namespace, out: Path) -> str:
    from mpisjax.export.stablehlo import PLATFORMS, to_stablehlo
    from mpisjax.storage.run_folder import write_atomically

    write_atomically(out, bytes(to_stablehlo(trained, given.num_steps, batch_size=given.batch_size)))
    batch = given.batch_size or "any"
    return f"{out}: {out.stat().st_size:,} bytes, for {', '.join(PLATFORMS)}, batch size {batch}"


if __name__ == "__main__":
    main()
