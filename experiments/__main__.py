"""The paper's tables and figures, one command each.

    python -m experiments all --scale smoke                     # the digits, minutes, no download
    python -m experiments table1 --scale small --data_dir DIR   # Fashion-MNIST at the paper's size
    python -m experiments fair --scale small --data_dir DIR --seeds 0   # a seed a command; the others' rows stay
    python -m experiments table3 --scale paper --dry_run        # what would be trained, and how many steps
    python -m experiments docs                                  # docs/ from docs/results/*/*.json

Every experiment goes on where it stopped: finished rows are in OUT/EXPERIMENT/results.json, training runs in
OUT/training. It writes OUT/EXPERIMENT/table.md and its figures as PNG and SVG. Networks are trained as
`train.py` trains them; experiments that need the same one share it. Times are worth something on an idle
machine only; --no_timing leaves them out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import mpisjax_launch
from experiments import docs
from experiments.catalog import EXPERIMENTS, document, plan
from experiments.scales import NAMES, Scale, scale_of
from mpisjax import cli
from mpisjax.cli.arguments import Parser, local_path, path, whole_number, whole_numbers
from mpisjax.storage.preemption import watch


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `scale` and `names` are what it asks for."""
    parser = Parser("python -m experiments", __doc__)
    parser.add_argument(
        "experiment", choices=(*EXPERIMENTS, "all", "docs"), help="which one, or all; docs writes docs/ anew"
    )
    parser.add_argument("--scale", choices=NAMES, default="smoke", help="size of the experiments")
    parser.add_argument("--out", type=local_path, help="folder for everything; runs/experiments/SCALE by default")
    parser.add_argument(
        "--data_dir", type=path, default="", help="the data sets' files, or folders named after the sets"
    )
    parser.add_argument("--seeds", type=whole_numbers(0), help="such as 0,1,2; the scale's own by default")
    parser.add_argument("--epochs", type=whole_number(1), help="instead of the scale's own; not for smoke")
    parser.add_argument("--num_steps", type=whole_numbers(1), help="of table1, only these T, such as 30")
    parser.add_argument("--no_timing", action="store_true", help="leave times of a step out")
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and end")
    parser.add_argument("--take", type=local_path, metavar="OUT", help="docs: first copy the results of this folder")
    parser.add_argument("--check", action="store_true", help="docs: change nothing; fail if a table is stale")
    given = parser.parse_args(argv)
    if (given.take or given.check) and given.experiment != "docs":
        parser.error("--take and --check are for docs")
    given.names = tuple(EXPERIMENTS) if given.experiment == "all" else (given.experiment,)
    if given.epochs is not None and given.scale == "smoke":
        parser.error("--epochs is for --scale small, laptop or paper")
    scale = scale_of(given.scale, given.epochs)
    if given.seeds is not None:
        scale = scale._replace(seeds=given.seeds)
    if given.num_steps is not None:
        pairs = tuple(pair for pair in scale.through_time if pair.ours.steps in given.num_steps)
        if not pairs:
            known = ", ".join(map(str, sorted({pair.ours.steps for pair in scale.through_time})))
            parser.error(f"--num_steps asks for no T of table1 at this scale: choose among {known}")
        scale = scale._replace(through_time=pairs)
    given.chosen_scale = scale
    return given


def run(names: tuple[str, ...], scale: Scale, flags: argparse.Namespace) -> None:
    """Runs experiments and writes what they gave."""
    with watch() as stopper:
        from mpisjax.cpu import cores
        from mpisjax.training import devices

        # The devices must be settled before anything makes JAX look for them.
        cores.prepare()
        devices.compilation_cache()

        from experiments.study import Study
        from experiments.tables import save_figures
        from mpisjax.storage.run_folder import write_atomically

        out = flags.out or Path("runs") / "experiments" / scale.name
        study = Study(scale, out, flags.data_dir, stopper, timing=not flags.no_timing, flags=shown_flags(flags))
        for name in names:
            experiment = EXPERIMENTS[name]
            content = experiment.run(study)
            page = document(experiment, content)
            save_figures(experiment.draw(content), study.folder(name))
            write_atomically(study.folder(name) / "table.md", page.encode())
            print(f"\n{page}\nwritten to {study.folder(name)}", flush=True)


def shown_flags(flags: argparse.Namespace) -> str:
    """The flags that a table's command needs to be the same again."""
    data = " --data_dir DIR" if flags.data_dir else ""
    listed = {"seeds": flags.seeds, "epochs": flags.epochs and (flags.epochs,), "num_steps": flags.num_steps}
    given = "".join(f" --{k} {','.join(map(str, v))}" for k, v in listed.items() if v is not None)
    return data + given + (" --no_timing" if flags.no_timing else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    flags = arguments(argv)
    for name, level in (("experiments", logging.INFO), ("mpisjax", logging.WARNING)):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.setLevel(level)
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    with cli.report_user_errors():
        if flags.experiment == "docs":
            docs.main(flags.take, flags.check)
        elif flags.dry_run:
            print(plan(flags.names, flags.chosen_scale))
        else:
            run(flags.names, flags.chosen_scale, flags)


if __name__ == "__main__":
    mpisjax_launch.with_large_pages()
    main()
