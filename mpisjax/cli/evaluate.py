"""Measures the best state of a run: accuracy by the equivalent path and by spikes alone, residuals, firing rates.

    mpisjax evaluate --workdir runs/digits
    mpisjax evaluate --workdir runs/digits --num_steps 1,2,5,10,30 --json out.json
    mpisjax evaluate --workdir runs/digits --report report.html
    mpisjax evaluate --pretrained digits

Prints tables, and the same figures as one line of JSON on standard output, or in --json FILE. The config is the
run's own; --config.data.dir=DIR and the like override it where files lie elsewhere. Several processes share the work as
in train.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpisjax import cli
from mpisjax.cli.arguments import Parser, path, whole_numbers
from mpisjax.errors import UserError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("mpisjax evaluate", __doc__, with_config=True)
    parser.add_argument("--workdir", type=path, default="runs/digits", help="folder of the run")
    parser.add_argument("--pretrained", help="a network that comes with the package, instead of a run")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what to measure on")
    parser.add_argument("--json", type=path, help="file for the figures as JSON; standard output by default")
    parser.add_argument(
        "--num_steps",
        type=whole_numbers(1),
        default=[],
        help="numbers of time steps to compare, such as 1,2,5,10,30",
    )
    parser.add_argument(
        "--report",
        type=path,
        help="file for an HTML page of the run, on the split's first 1,000 examples",
    )
    cli.add_process_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command."""
    cli.run(_main, make_parser(), _config_of_run, arguments)


def _config_of_run(given, config_file: str | None):
    """The config that the run was trained with."""
    if config_file is not None:
        raise UserError(
            "evaluate takes the config from --workdir or --pretrained; leave --config out, or override single settings"
        )
    if given.pretrained is not None:
        import mpisjax

        return mpisjax.load_pretrained(given.pretrained).config
    from mpisjax.training.run import saved_config
    from mpisjax.training.run_folder import path_of

    return saved_config(path_of(given.workdir))


def _main(given, config) -> None:
    from mpisjax.configuration import prepare_cores
    from mpisjax.training import devices, processes

    prepare_cores(config)
    with processes.exit_on_failure():
        processes.initialize(*cli.process_arguments(given))
        devices.compilation_cache()
        _evaluate(given, config, processes.is_primary())


def _evaluate(given, config, first: bool) -> None:
    """What `main` does on prepared devices; of several processes the first alone prints and writes."""
    from rich.console import Console

    from mpisjax import configuration
    from mpisjax.training import evaluation
    from mpisjax.training.run import evaluate_at, restore_best
    from mpisjax.training.run_folder import path_of, write_atomically

    counts = given.num_steps
    if given.json is not None and not Path(given.json).parent.is_dir():
        raise UserError(f"--json {given.json} lies in no folder; make the folder or name another file")
    if given.report is not None and not Path(given.report).parent.is_dir():
        raise UserError(f"--report {given.report} lies in no folder; make the folder or name another file")
    if given.pretrained is None:
        origin = given.workdir
        parts, state, step = restore_best(path_of(origin), config)
    else:
        from mpisjax.pretrained import restore

        origin = f"pretrained {given.pretrained}"
        parts, state, step = restore(given.pretrained, config)
    split = getattr(parts.dataset, given.split)
    if not len(split.labels):
        raise UserError(f"the run holds out no {given.split} examples; choose --split test")
    if counts and parts.dataset.temporal:
        raise UserError(
            "--num_steps needs a constant input; an event set takes as many steps as data.num_frames"
        )
    console = Console(quiet=not first)
    readout = evaluation.readout_name(configuration.make_bptt(config))
    results = evaluation.as_json(evaluate_at(config, parts, state, split, None))
    epoch = step // parts.feed.steps_per_epoch
    examples = f"{given.split} split, {results['num_examples']} examples"
    evaluation.show(console, f"{origin}, state of epoch {epoch}, {examples}", results, readout)
    if counts:
        results["by_steps"] = [
            evaluation.as_json(evaluate_at(config, parts, state, split, count)) for count in counts
        ]
        evaluation.show_steps(console, results["by_steps"], readout)
    if not first:
        return
    if given.report is not None:
        import jax

        from mpisjax.analysis.report import STEPS as REPORTED_STEPS
        from mpisjax.analysis.report import Subject, write_report
        from mpisjax.training.state import evaluated_variables

        subject = Subject(
            name=config.name,
            method=config.train.method,
            net=parts.net,
            variables=jax.device_get(evaluated_variables(state)),
            neuron=configuration.make_neuron(config),
            num_steps=config.forward.num_steps,
            solver=configuration.make_evaluation_solver(config),
            evaluations=config.forward.max_steps,
            through_time=configuration.make_bptt(config),
            batch_size=config.train.batch_size,
            settings=configuration.to_plain(config),
        )
        write_report(
            subject,
            parts.dataset,
            split,
            origin,
            given.report,
            steps=counts or REPORTED_STEPS,
        )
    source = {"workdir": origin} if given.pretrained is None else {"pretrained": given.pretrained}
    header = {**source, "checkpoint_step": step, "split": given.split}
    text = json.dumps({**header, **results})
    if given.json is None:
        print(text)
    else:
        write_atomically(Path(given.json), f"{text}\n".encode())
