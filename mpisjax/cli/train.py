"""Trains a multi-parallel implicit-stream spiking network, or goes on with a run that was interrupted.

    mpisjax train                                             # scikit-learn's digits, minutes, no download
    mpisjax train --config fashion_mnist:low --config.data.dir=DIR --config.train.epochs=3
    mpisjax train --seeds 0,1,2                               # three runs, their mean and deviation
    mpisjax train --config fashion_mnist --then low           # rates first, then spikes at low latency

`--config` names a config that comes with the package (digits, mnist, fashion_mnist, ...), or a Python file. Any setting
can be given as --config.KEY=VALUE. Results go to --workdir: checkpoints, metrics.jsonl, TensorBoard events, train.log,
and at the end results.json and curves.png. Run the same command again to go on after an interruption; the outcome is
bit for bit that of an uninterrupted run on the same devices. In a clone, `python train.py` is the same program.

Several processes share a run: on Cloud TPU start the command on every host (docs/tpu.md); elsewhere add, on each,

    --coordinator=HOST:PORT --num_processes=N --process_id=0   # 1, 2, ... on the others
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from mpisjax import cli
from mpisjax.cli.arguments import Parser, path, whole_numbers
from mpisjax.configuration.config_files import changed_by, load_config, packaged_configs
from mpisjax.storage.preemption import Stopper, watch

_log = logging.getLogger("mpisjax.cli.train")


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("mpisjax train", __doc__, with_config=True)
    parser.add_argument("--workdir", type=path, help="folder of the run; runs/<config.name> by default")
    parser.add_argument(
        "--seeds",
        type=whole_numbers(0),
        default=(),
        help="train once with each of these seeds, such as 0,1,2, each in a folder of its own below --workdir, by "
        "default below runs/<config.name>_seeds",
    )
    parser.add_argument(
        "--then",
        metavar="VARIANT",
        help="then train on from the best epoch with another variant of the same config, in a folder below the first "
        "run's; what the variant sets wins over --config.KEY=VALUE",
    )
    parser.add_argument("--profile", action="store_true", help="trace a few steps into the folder of the run")
    cli.add_process_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command."""
    cli.run(_main, make_parser(), _config, arguments)


# Data sets without a config of their name, and whose recipe serves them.
SERVED_BY = {"ssc": "shd:ssc", "dvs_gesture": "recordings", "cifar10_dvs": "recordings"}


def _config(given: argparse.Namespace, config_file: str | None) -> ml_collections.ConfigDict:
    """The config that `--config` names; without it, that of the data set which --config.data.name names."""
    named = [value for key, _, value in (one.partition("=") for one in given.overrides) if key.endswith("data.name")]
    given.chosen = None
    if config_file is None and named:
        name = SERVED_BY.get(named[-1], named[-1])
        if name.partition(":")[0] in packaged_configs():
            config_file = given.chosen = name
    given.config_file = config_file or "digits"
    return load_config(given.config_file)


def _main(given: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    from mpisjax.storage import processes

    if given.chosen:
        _log.info("settings: --config %s, since data.name is %s; --config names others", given.chosen, config.data.name)
    with watch() as stopper, processes.exit_on_failure():
        cli.prepare(given, config)
        if given.seeds:
            _sweep(given, config, stopper)
        else:
            _stages(given, config, given.workdir or f"runs/{config.name}", stopper)


def _stages(given: argparse.Namespace, config: ml_collections.ConfigDict, workdir: str, stopper: Stopper) -> Any:
    """One run, or two with `--then`; gives what the last one gave."""
    second = changed_by(given.then, config, given.config_file) if given.then else None
    result = _train(config, workdir, stopper, given.profile)
    if second is None or result.stopped:
        return result
    second.train.init_from = workdir
    _log.info("now %s, from the best epoch of %s", second.name, workdir)
    return _train(second, f"{workdir}/{given.then}", stopper, given.profile)


def _train(config: ml_collections.ConfigDict, workdir: str, stopper: Stopper, profile: bool) -> Any:
    from mpisjax.training.run import run

    def draw(folder: Path) -> None:
        from mpisjax.analysis.curves import draw_curves  # imports matplotlib, which takes a while

        draw_curves(folder, config.name)

    return run(config, workdir, stopper, on_end=draw, profile=profile)


def _sweep(given: argparse.Namespace, config: ml_collections.ConfigDict, stopper: Stopper) -> None:
    """Trains with each seed, prints mean and deviation, and writes them to `seeds.json`."""
    from mpisjax.storage import processes
    from mpisjax.storage.run_folder import path_of, write_atomically

    workdir = given.workdir or f"runs/{config.name}_seeds"
    results: dict[int, dict[str, float]] = {}
    for seed in given.seeds:
        one = config.copy_and_resolve_references()
        one.seed = seed
        _log.info("seed %d of %s", seed, ", ".join(map(str, given.seeds)))
        result = _stages(given, one, f"{workdir}/seed_{seed}", stopper)
        if result.stopped:
            return
        results[seed] = accuracies(result)
    summary = summarize(results)
    for name, mean in summary["mean"].items():
        deviation = 100 * summary["deviation"][name]
        _log.info("%s accuracy over the seeds: %.2f ± %.2f%%", name, 100 * mean, deviation)
    if processes.is_primary():
        text = json.dumps({"seeds": {str(seed): found for seed, found in results.items()}, **summary}, indent=1)
        write_atomically(path_of(workdir) / "seeds.json", f"{text}\n".encode())


def accuracies(result: Any) -> dict[str, float]:
    """The accuracies of a run that has ended, by what they are of.

    Args:
        result: What `mpisjax.training.run.run` gave.
    """
    test: Mapping[str, Any] = result.test or {}
    found = {
        "validation": result.best_accuracy,
        "test": test.get("accuracy"),
        "test, spikes alone": test.get("accuracy_spikes"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def summarize(results: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of every accuracy that all of them have.

    Args:
        results: By seed, what `accuracies` gave.

    Returns:
        `mean` and `deviation` by accuracy; the deviation is that of a sample (n - 1), and 0 of one seed.
    """
    shared = [name for name in next(iter(results.values())) if all(name in one for one in results.values())]
    values = {name: [one[name] for one in results.values()] for name in shared}
    return {
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "deviation": {name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()},
    }
