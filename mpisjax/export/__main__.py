"""Writes a trained network for other programs.

python -m mpisjax.export --pretrained digits --format stablehlo --out digits.stablehlo
python -m mpisjax.export --workdir runs/digits --format nir --out digits.nir
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpisjax import cli
from mpisjax.cli.arguments import Parser, local_path, path, whole_number
from mpisjax.errors import UserError


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("python -m mpisjax.export", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=path, help="folder of a run; its best state is exported")
    source.add_argument("--pretrained", help="a network that comes with the package")
    parser.add_argument(
        "--data_dir", type=path, help="folder with the run's original files, if they have moved"
    )
    parser.add_argument("--format", required=True, choices=("nir", "stablehlo"), help="what to write")
    parser.add_argument("--out", required=True, type=local_path, help="file to write")
    parser.add_argument(
        "--num_steps", type=whole_number(1), help="stablehlo: time steps; as trained by default"
    )
    parser.add_argument(
        "--batch_size", type=whole_number(1), help="stablehlo: the one batch size; any by default"
    )
    parser.add_argument(
        "--neurons",
        default="exact",
        choices=("exact", "lif"),
        help="nir: exact nodes, or IF/LIF nodes that must be told to reset by subtraction",
    )
    given = parser.parse_args(argv)
    if (given.num_steps or given.batch_size) and given.format == "nir":
        parser.error(
            "--num_steps and --batch_size are for --format stablehlo; a NIR graph is stepped by its host"
        )
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the file."""
    given = arguments(argv)
    with cli.report_user_errors():
        if not given.out.absolute().parent.is_dir():
            raise UserError(f"--out {given.out} lies in no folder; make the folder or name another file")
        trained = _trained(given)
        if trained.inputs.temporal and given.num_steps:
            raise UserError(
                "--num_steps needs a constant input; an event set takes as many steps as it has frames"
            )
        write = _write_nir if given.format == "nir" else _write_stablehlo
        print(write(trained, given, given.out))


def _trained(given: argparse.Namespace) -> Any:
    if given.pretrained is not None:
        from mpisjax.pretrained import load_pretrained

        return load_pretrained(given.pretrained)
    from mpisjax.pretrained.save import from_run
    from mpisjax.training.run import saved_config

    config = saved_config(Path(given.workdir))
    if given.data_dir is not None:
        config.data.dir = given.data_dir
    return from_run(given.workdir, config)


def _write_nir(trained: Any, given: argparse.Namespace, out: Path) -> str:
    from mpisjax.export import nir_graph, nir_nodes

    inputs = trained.inputs
    about = {"name": trained.name, "inputs": inputs._asdict(), "num_steps": trained.config.forward.num_steps}
    height, width, channels = inputs.shape[-3:]
    graph = nir_graph.to_nir(
        trained.net, trained.variables, trained.neuron, (height, width, channels),
        neurons=given.neurons, about=about,
    )  # fmt: skip
    draft = out.with_name(f"{out.name}.draft")
    try:
        nir_nodes.package().write(draft, graph)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return f"{out}: {out.stat().st_size:,} bytes, {len(graph.nodes)} nodes, {len(graph.edges)} edges"


def _write_stablehlo(trained: Any, given: argparse.Namespace, out: Path) -> str:
    from mpisjax.export.stablehlo import PLATFORMS, to_stablehlo
    from mpisjax.training.run_folder import write_atomically

    write_atomically(out, bytes(to_stablehlo(trained, given.num_steps, batch_size=given.batch_size)))
    batch = given.batch_size or "any"
    return f"{out}: {out.stat().st_size:,} bytes, for {', '.join(PLATFORMS)}, batch size {batch}"


if __name__ == "__main__":
    main()
