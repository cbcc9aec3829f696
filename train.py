"""Trains a multi-parallel implicit-stream spiking network, or goes on with a run that was interrupted.

    python train.py                                                  # scikit-learn's digits, minutes, no download
    python train.py --config configs/fashion_mnist.py --config.data.dir=DIR --config.train.epochs=3

Any setting of the config can be given as --config.KEY=VALUE. Results go to --workdir: checkpoints, metrics.jsonl,
TensorBoard events, train.log, and at the end results.json and curves.png. Run the same command again to go on after
an interruption; the outcome is bit for bit that of an uninterrupted run on the same devices.

Several processes share a run: on Cloud TPU start the command on every host (docs/tpu.md); elsewhere add, on each,

    --coordinator=HOST:PORT --num_processes=N --process_id=0   # 1, 2, ... on the others
"""

import contextlib
import os
import signal
import sys

import launch


def leave(number, frame) -> None:
    """Ends the program in good order while nothing has begun, or everything is over."""
    os.write(2, f"stopped by {signal.Signals(number).name}; run the same command to go on\n".encode())
    with contextlib.suppress(RuntimeError, OSError):
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # before JAX is imported, which takes seconds; `watch` listens from there on
    launch.with_large_pages()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)

from pathlib import Path  # noqa: E402

from mpisjax import cli  # noqa: E402
from mpisjax.arguments import Parser, path  # noqa: E402
from mpisjax.training.preemption import watch  # noqa: E402

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "digits.py"


def arguments() -> Parser:
    """The program's flags."""
    parser = Parser("train.py", __doc__, with_config=True)
    parser.add_argument("--workdir", type=path, help="folder of the run; runs/<config.name> by default")
    parser.add_argument("--profile", action="store_true", help="trace a few steps into the folder of the run")
    cli.add_process_arguments(parser)
    return parser


def draw(folder: Path, name: str) -> None:
    """Draws the curves of a run that is complete."""
    from mpisjax.analysis.curves import draw_curves  # imports matplotlib, which takes a while

    draw_curves(folder, name)


def main(given, config) -> None:
    """Trains as the config says."""
    from mpisjax.configuration import prepare_cores
    from mpisjax.training import devices, processes

    with watch() as stopper, processes.exit_on_failure():
        # The devices must be settled before anything makes JAX look for them.
        prepare_cores(config)
        processes.initialize(*cli.process_arguments(given))
        devices.compilation_cache()

        from mpisjax.training.run import run

        workdir = given.workdir or f"runs/{config.name}"
        run(config, workdir, stopper, on_end=lambda folder: draw(folder, config.name), profile=given.profile)


if __name__ == "__main__":
    cli.run(main, arguments(), cli.config_from(DEFAULT_CONFIG))
