"""The paper's tables and figures, one command each.

    python -m experiments all --scale smoke                                # the digits, minutes, no download
    python -m experiments table1 --scale small --data_dir DIR              # Fashion-MNIST at the paper's size, few epochs
    python -m experiments table3 --scale paper --data_dir DIR --dry_run    # what would be trained, and how many steps
    python -m experiments docs                                             # docs/ from docs/results/*/*.json

Every experiment goes on where it stopped: finished rows are in OUT/EXPERIMENT/results.json, training runs in
OUT/training. It writes OUT/EXPERIMENT/table.md and its figures as PNG and SVG. Networks are trained as `train.py`
trains them; experiments that need the same one share it. Times are worth something on an idle machine only; --no_timing
leaves them out.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import launch
from experiments.catalog import EXPERIMENTS, document, plan
from experiments.scales import NAMES, Scale, scale_of
from mpisjax import cli
from mpisjax.errors import UserError
from mpisjax.training.preemption import SIGNALS, Preempted, watch


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="experiment", required=True, metavar="|".join([*EXPERIMENTS, "all", "docs"])
    )
    for name in (*EXPERIMENTS, "all"):
        help_text = "every experiment" if name == "all" else EXPERIMENTS[name].TITLE
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("--scale", choices=NAMES, default="smoke")
        command.add_argument(
            "--out", type=Path, help="folder for everything; runs/experiments/SCALE by default"
        )
        command.add_argument(
            "--data_dir", default="", help="the data sets' files, or folders named after the sets"
        )
        command.add_argument("--seeds", help="such as 0,1,2; the scale's own by default")
        command.add_argument("--epochs", type=int, help="instead of the small or paper scale's own")
        command.add_argument("--steps", help="of table1, only these T, such as 30")
        command.add_argument("--no_timing", action="store_true", help="leave times of a step out")
        command.add_argument("--dry_run", action="store_true", help="say what would be trained, and end")
    command = commands.add_parser("docs", help="writes the tables of docs/ anew from docs/results")
    command.add_argument(
        "--take", type=Path, metavar="OUT", help="first copy the results of this folder there"
    )
    command.add_argument(
        "--check", action="store_true", help="change nothing; fail where a table is not as generated"
    )
    return parser.parse_args(argv)


def chosen_scale(flags: argparse.Namespace) -> Scale:
    """The scale as the command line changes it.

    Raises:
        UserError: A flag says what cannot be.
    """
    if flags.epochs is not None and (flags.epochs < 1 or flags.scale == "smoke"):
        raise UserError(f"--epochs is {flags.epochs}: give at least 1, with --scale small or paper.")
    scale = scale_of(flags.scale, flags.epochs)
    if flags.seeds is not None:
        scale = scale._replace(seeds=tuple(_numbers("--seeds", flags.seeds, 0)))
    if flags.steps is not None:
        wanted = _numbers("--steps", flags.steps, 1)
        pairs = tuple(p for p in scale.through_time if p.ours.steps in wanted)
        if not pairs:
            known = sorted({p.ours.steps for p in scale.through_time})
            raise UserError(f"--steps is {flags.steps}: choose among {', '.join(map(str, known))}.")
        scale = scale._replace(through_time=pairs)
    return scale


def _numbers(flag: str, text: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise UserError(
            f"{flag} is {text!r}: give whole numbers from {least} on, such as {least},{least + 1}."
        )
    return list(dict.fromkeys(map(int, parts)))


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
        from mpisjax.training.atomic import write_atomically

        out = flags.out or Path("runs") / "experiments" / scale.name
        study = Study(
            scale, out, flags.data_dir, stopper, timing=not flags.no_timing, flags=shown_flags(flags)
        )
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
    given = "".join(
        f" --{k} {getattr(flags, k)}" for k in ("seeds", "epochs", "steps") if getattr(flags, k) is not None
    )
    return data + given + (" --no_timing" if flags.no_timing else "")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    flags = arguments(argv)
    for name, level in (("experiments", logging.INFO), ("mpisjax", logging.WARNING)):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.setLevel(level)
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        if flags.experiment == "docs":
            from experiments import docs as pages

            return pages.main(flags.take, flags.check)
        scale = chosen_scale(flags)
        names = tuple(EXPERIMENTS) if flags.experiment == "all" else (flags.experiment,)
        if flags.dry_run:
            print(plan(names, scale))
            return 0
        run(names, scale, flags)
        return 0
    except Preempted as stop:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print(f"stopped by {stop}; run the same command to go on", file=sys.stderr, flush=True)
        return 0
    except Exception as error:
        sentence = cli.explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    launch.with_large_pages()
    sys.exit(main())
