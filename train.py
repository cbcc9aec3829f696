"""Trains a multi-parallel implicit-stream spiking network, or goes on with a run that was interrupted.

    python train.py                                                  # scikit-learn's digits, minutes, no download
    python train.py --config configs/fashion_mnist.py --config.data.dir=DIR --config.train.epochs=3

Any setting of the config can be given as --config.KEY=VALUE. Results go to --workdir: checkpoints, metrics.jsonl,
TensorBoard events, train.log, and at the end results.json and curves.png. Run the same command again to go on after
an interruption; the outcome is bit for bit that of an uninterrupted run on the same devices.
"""

from pathlib import Path

from absl import flags

from mpisjax import cli
from mpisjax.training.preemption import watch

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "digits.py"
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; runs/<config.name> by default")


def main(config) -> None:
    """Trains as the config says."""
    from mpisjax.training import devices

    with watch() as stopper:
        # The devices must be settled before anything makes JAX look for them.
        devices.prepare(config.devices.all_cores)
        devices.compilation_cache()

        from mpisjax.training.run import run

        run(config, WORKDIR.value or f"runs/{config.name}", stopper)


if __name__ == "__main__":
    cli.run(main, cli.config_from(DEFAULT_CONFIG))
