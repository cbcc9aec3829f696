"""Measures the best state of a run: accuracies, residuals, firing rates, classes, and answers that come early.

    mpisjax evaluate --workdir runs/digits
    mpisjax evaluate --workdir runs/digits --num_steps 1,2,5,10,30
    mpisjax evaluate --workdir runs/digits --json out.json --csv tables
    mpisjax evaluate --pretrained digits

Prints tables. `--json FILE` writes the same figures, with the confusion matrix and the misclassified examples, as JSON
(`--json -`: to standard output, and no tables); `--csv FOLDER` writes classes.csv, confusion.csv and misclassified.csv.
The early exit stops each example at its first sure answer; how sure is chosen on the validation split, if that has 100
examples. The config is the run's own;
--config.data.dir=DIR and the like override it where files lie elsewhere. Several processes share the work as in
training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, path


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("mpisjax evaluate", __doc__, with_config=True)
    named.add_network_arguments(parser, workdir="runs/digits")
    named.add_split_arguments(parser)
    parser.add_argument("--json", type=path, help="file for the figures as JSON; - for standard output")
    parser.add_argument("--csv", type=path, help="folder for the figures by class as CSV; made if it is missing")
    parser.add_argument(
        "--no_early_exit",
        dest="early_exit",
        action="store_false",
        help="leave the early exit out, which takes as long again",
    )
    page = "file for an HTML page of the run, on the split's first 1,000 examples"
    parser.add_argument("--report", type=path, help=page)
    cli.add_process_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command."""
    cli.run(_main, make_parser(), named.config_of_run, arguments)


def _main(given, config) -> None:
    from mpisjax.storage import processes

    with processes.exit_on_failure():
        cli.prepare(given, config)
        _evaluate(given, config, processes.is_primary())


def _evaluate(given, config, first: bool) -> None:
    """What `main` does on prepared devices; of several processes the first alone prints and writes."""
    from rich.console import Console

    from mpisjax.analysis.anytime import held_out_count
    from mpisjax.analysis.classes import by_class
    from mpisjax.cli import tables
    from mpisjax.configuration import makers
    from mpisjax.pretrained.save import inputs_of
    from mpisjax.storage.run_folder import write_atomically
    from mpisjax.training import evaluation
    from mpisjax.training.run import evaluate_at
    from mpisjax.training.state import evaluated_variables

    for name, file in (("--json", given.json), ("--report", given.report)):
        if file not in (None, "-"):
            named.check_folder(name, file)
    origin, parts, state, step = named.restored(given, config)
    split = named.split_of(given, parts)
    console = Console(quiet=not first or given.json == "-")
    readout = evaluation.readout_name(makers.make_bptt(config))
    examined = makers.make_examiner(config, parts.net, parts.dataset)(evaluated_variables(state), split)
    results = evaluation.as_json(examined.evaluation)
    classes = by_class(split.labels, examined.answers, examined.confidence, inputs_of(parts.dataset).classes)
    epoch = step // parts.feed.steps_per_epoch
    examples = f"{given.split} split, {results['num_examples']} examples"
    tables.show(console, f"{origin}, state of epoch {epoch}, {examples}", results, readout)
    tables.show_classes(console, classes)
    if given.num_steps:
        results["by_steps"] = [
            evaluation.as_json(evaluate_at(config, parts, state, split, count)) for count in given.num_steps
        ]
        tables.show_steps(console, results["by_steps"], readout)
    if given.early_exit and (found := _early_exit(config, parts, state, split)) is not None:
        results["early_exit"] = found._asdict()
        tables.show_early_exit(console, found, held_out_count(parts.dataset))
    if not first:
        return
    if given.report is not None:
        from mpisjax.analysis.report import STEPS, write_report
        from mpisjax.cli.report import subject_of

        subject = subject_of(config, parts, state)
        write_report(subject, parts.dataset, split, origin, given.report, given.num_steps or STEPS)
    source = {"workdir": origin} if given.pretrained is None else {"pretrained": given.pretrained}
    text = json.dumps({**source, "checkpoint_step": step, "split": given.split, **results, **classes.as_json()})
    if given.json == "-":
        print(text)
    elif given.json is not None:
        write_atomically(Path(given.json), f"{text}\n".encode())
    if given.csv is not None:
        folder = Path(given.csv)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in classes.as_csv().items():
            write_atomically(folder / name, table.encode())


def _early_exit(config, parts, state, split):
    """What it gives to stop at sure answers; None where spikes alone are no answer, or too little is held out."""
    import jax

    from mpisjax.analysis import anytime
    from mpisjax.configuration import makers
    from mpisjax.storage import processes
    from mpisjax.training.state import evaluated_variables

    bptt, held_out = makers.make_bptt(config), len(parts.dataset.validation.labels)
    if processes.count() > 1 or held_out < anytime.LEAST_HELD_OUT or (bptt is not None and bptt.readout != "rate"):
        return None
    of_network = {
        "neuron": makers.make_neuron(config),
        "num_steps": None if parts.dataset.temporal else config.forward.num_steps,
        "batch_size": config.eval.batch_size,
    }
    variables = jax.device_get(evaluated_variables(state))
    chosen = anytime.on_held_out(parts.net, variables, parts.dataset, **of_network)
    found = anytime.record(parts.net, variables, parts.dataset, split, **of_network)
    return anytime.early_exit(found, chosen.threshold)
