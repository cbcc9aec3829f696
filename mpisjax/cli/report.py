"""Writes an HTML page about a run: curves, confusion, firing rates, convergence, spikes, energy, misclassified
examples.

    mpisjax report --workdir runs/digits --out report.html
    mpisjax report --pretrained digits --out report.html
    mpisjax report --pretrained digits --out report.html --figures plots

The page needs no other file; --figures also writes each plot as an SVG. It is measured on the split's first 1,000
examples. The config is the run's own; --config.data.dir=DIR and the like override it where files lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, path

if TYPE_CHECKING:
    from mpisjax.analysis.report import Subject


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("mpisjax report", __doc__, with_config=True)
    named.add_network_arguments(parser, workdir="runs/digits")
    named.add_split_arguments(parser)
    parser.add_argument("--out", type=path, required=True, help="HTML file to write")
    parser.add_argument("--figures", type=path, help="folder for every plot as an SVG file; made if it is missing")
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command."""
    cli.run(_main, make_parser(), named.config_of_run, arguments)


def _main(given: Any, config: Any) -> None:
    from mpisjax.analysis.report import STEPS, write_report
    from mpisjax.configuration.makers import prepare_cores
    from mpisjax.training import devices

    named.check_folder("--out", given.out)
    prepare_cores(config)
    devices.compilation_cache()
    origin, parts, state, _ = named.restored(given, config)
    split = named.split_of(given, parts)
    if given.figures is not None:
        Path(given.figures).mkdir(parents=True, exist_ok=True)
    subject = subject_of(config, parts, state)
    steps = given.num_steps or STEPS
    write_report(subject, parts.dataset, split, origin, given.out, steps, figure_folder=given.figures)
    print(f"written: {given.out}")


def subject_of(config: Any, parts: Any, state: Any) -> Subject:
    """What a report is about, from all settings, what they stand for, and the state to measure."""
    import jax

    from mpisjax import configuration
    from mpisjax.analysis.report import Subject
    from mpisjax.configuration import makers
    from mpisjax.pretrained.save import inputs_of
    from mpisjax.training.state import evaluated_variables

    return Subject(
        name=config.name,
        method=config.train.method,
        net=parts.net,
        variables=jax.device_get(evaluated_variables(state)),
        neuron=makers.make_neuron(config),
        num_steps=config.forward.num_steps,
        solver=makers.make_evaluation_solver(config),
        evaluations=config.forward.max_steps,
        through_time=makers.make_bptt(config),
        settings=configuration.to_plain(config),
        classes=inputs_of(parts.dataset).classes,
    )
