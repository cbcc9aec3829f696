"""Measures the best state of a run: accuracy by the equivalent path and by spikes alone, residuals, firing rates.

    python evaluate.py --workdir runs/digits
    python evaluate.py --workdir runs/digits --steps 1,2,5,10,30 --json out.json
    python evaluate.py --workdir runs/digits --report report.html
    python evaluate.py --pretrained digits

Prints tables, and the same figures as one line of JSON on standard output, or in --json FILE. The config is the
run's own; --config.data.dir=DIR and the like override it where files lie elsewhere. Several processes share the work as
in train.py.
"""

import json
from pathlib import Path

import launch

if __name__ == "__main__":
    launch.with_large_pages()

from absl import flags

from mpisjax import cli
from mpisjax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "folder of the run")
PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "a network that comes with the package, instead of a run"
)
SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "what to measure on")
JSON = flags.DEFINE_string("json", None, "file for the figures as JSON; standard output by default")
STEPS = flags.DEFINE_list("steps", [], "numbers of time steps to compare, such as 1,2,5,10,30")
REPORT = flags.DEFINE_string(
    "report", None, "file for an HTML page of the run, on the split's first 1,000 examples"
)


def config_of_run(arguments: cli.Arguments):
    """The config that the run was trained with."""
    if arguments.config_file is not None:
        raise UserError(
            "evaluate.py takes the config from --workdir or --pretrained; leave --config out, or override single settings"
        )
    if PRETRAINED.value is not None:
        import mpisjax

        return mpisjax.load_pretrained(PRETRAINED.value).config
    from mpisjax.training.run import saved_config
    from mpisjax.training.run_folder import path_of

    return saved_config(path_of(WORKDIR.value))


def main(config) -> None:
    """Evaluates as the flags say."""
    from mpisjax.cpu import cores
    from mpisjax.training import devices, processes

    cores.prepare(config)
    with processes.exit_on_failure():
        processes.initialize(*cli.process_arguments())
        devices.compilation_cache()
        _evaluate(config, processes.is_primary())


def _evaluate(config, first: bool) -> None:
    """What `main` does on prepared devices; of several processes the first alone prints and writes."""
    from rich.console import Console

    from mpisjax.training import report
    from mpisjax.training.atomic import write_atomically
    from mpisjax.training.run import evaluate_at, restore_best
    from mpisjax.training.run_folder import path_of

    counts = [_steps(item) for item in STEPS.value]
    if JSON.value is not None and not Path(JSON.value).parent.is_dir():
        raise UserError(f"--json {JSON.value} lies in no folder; make the folder or name another file")
    if REPORT.value is not None and not Path(REPORT.value).parent.is_dir():
        raise UserError(f"--report {REPORT.value} lies in no folder; make the folder or name another file")
    if PRETRAINED.value is None:
        origin = WORKDIR.value
        parts, state, step = restore_best(path_of(origin), config)
    else:
        from mpisjax.pretrained import restore

        origin = f"pretrained {PRETRAINED.value}"
        parts, state, step = restore(PRETRAINED.value, config)
    split = getattr(parts.dataset, SPLIT.value)
    if not len(split.labels):
        raise UserError(f"the run holds out no {SPLIT.value} examples; choose --split test")
    if counts and parts.dataset.temporal:
        raise UserError("--steps needs a constant input; an event set takes as many steps as data.num_frames")
    console = Console(quiet=not first)
    results = report.as_json(evaluate_at(config, parts, state, split, None))
    epoch = step // parts.feed.steps_per_epoch
    examples = f"{SPLIT.value} split, {results['num_examples']} examples"
    report.show(
        console, f"{origin}, state of epoch {epoch}, {examples}", results, report.readout_name(config)
    )
    if counts:
        results["by_steps"] = [
            report.as_json(evaluate_at(config, parts, state, split, count)) for count in counts
        ]
        report.show_steps(console, results["by_steps"], report.readout_name(config))
    if not first:
        return
    if REPORT.value is not None:
        import jax

        from mpisjax.analysis.report import STEPS as REPORTED_STEPS
        from mpisjax.analysis.report import write_report
        from mpisjax.training.run import variables_of

        variables = jax.device_get(variables_of(state))
        write_report(
            config,
            parts.net,
            variables,
            parts.dataset,
            split,
            origin,
            REPORT.value,
            steps=counts or REPORTED_STEPS,
        )
    source = {"workdir": origin} if PRETRAINED.value is None else {"pretrained": PRETRAINED.value}
    header = {**source, "checkpoint_step": step, "split": SPLIT.value}
    text = json.dumps({**header, **results})
    if JSON.value is None:
        print(text)
    else:
        write_atomically(Path(JSON.value), f"{text}\n".encode())


def _steps(item: str) -> int:
    if not item.strip().isdigit() or int(item) < 1:
        raise UserError(f"--steps holds {item!r}; give whole numbers from 1 on, such as 1,2,5,10,30")
    return int(item)


if __name__ == "__main__":
    cli.run(main, config_of_run)
