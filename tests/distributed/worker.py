"""Trains a small network on the digits for some steps, on given devices and processes, and writes what came of it.

    python tests/distributed/worker.py --out FOLDER --case float32 --case float64 [--devices 8] [--checkpoint FOLDER]
        [--save FOLDER] [--coordinator HOST:PORT --num_processes N --process_id I] [--model_parallel 1]

For each case FOLDER/CASE.npz holds the parameters and running statistics after `STEPS` steps, and each step's loss.
With
--save the float32 state of half the steps is saved there as a checkpoint; with --checkpoint it is restored from there,
one step is taken, FOLDER/next.npz holds the outcome, and FOLDER/evaluation.json an evaluation of fresh weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

STEPS, BATCH = 20, 48


def settings() -> Any:
    """Two fused streams and all that depends on a batch: augmentation, dropout, batch statistics."""
    from mpisjax.configuration import config_files

    config = config_files.load_config(str(Path(__file__).resolve().parents[2] / "configs" / "digits.py"))
    config.update_from_flattened_dict(
        {
            "model.stem": (4,),
            "model.layers": (4, 8),
            "model.dropout": 0.1,
            "forward.mode": "rates",
            "forward.max_steps": 3,
            "adjoint.max_steps": 3,
            # All steps for every sample: one whose residual lies at its tolerance would take one more or one less as
            # sums are rounded.
            "forward.tol": 0.0,
            "adjoint.tol": 0.0,
            "train.batch_size": BATCH,
            "train.epochs": 1,
            "train.warmup_epochs": 0.1,
            "eval.batch_size": 64,
        }
    )
    return config


class Trainer:
    """A run of `settings()` in one dtype, on a mesh."""

    def __init__(self, config: Any, dataset: Any, dtype: str, num_devices: int | None) -> None:
        import jax
        import jax.numpy as jnp

        from mpisjax.configuration import makers
        from mpisjax.data import Feed
        from mpisjax.training import devices

        self.net = makers.make_network(config, dataset).clone(dtype=jnp.dtype(dtype))
        self.mesh = makers.make_mesh(config, BATCH)
        if num_devices is not None:
            self.mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("data",))
        self.feed = Feed(dataset.train, BATCH, config.seed, devices.batch_sharding(self.mesh))

        def initial() -> Any:
            variables = makers.initial_variables(config, self.net, dataset)
            return makers.init_state(config, variables, self.feed.steps_per_epoch)

        place = devices.state_sharding(jax.eval_shape(initial), self.mesh)
        self.state = jax.jit(initial, out_shardings=place)()
        self.step = makers.make_train_step(config, self.net, dataset, self.feed.steps_per_epoch, self.mesh)
        self.losses: list[float] = []

    def advance(self, first: int, last: int) -> None:
        import jax

        for number in range(first, last):
            self.state, metrics = self.step(self.state, self.feed.batch(number))
            jax.block_until_ready(metrics)
            self.losses.append(float(metrics.loss))

    def write(self, path: Path) -> None:
        import jax
        import numpy as np

        from mpisjax.storage import processes

        tree = processes.to_host({"params": self.state.params, "batch_stats": self.state.batch_stats})
        arrays = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}
        if processes.is_primary():
            np.savez(path, losses=np.asarray(self.losses), **arrays)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--devices", type=int)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--model_parallel", type=int, default=1)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    arguments = parser.parse_args()

    import jax

    from mpisjax.configuration import makers
    from mpisjax.cpu import cores
    from mpisjax.storage import checkpoints, processes, saving

    jax.config.update("jax_disable_most_optimizations", True)
    cores.prepare()
    processes.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    config = settings()
    config.devices.model_parallel = arguments.model_parallel
    dataset = makers.make_dataset(config)
    trainer = None
    for case in sorted(arguments.case, reverse=True):  # float32, whose trainer is used again, comes last
        with jax.enable_x64(case == "float64"):
            trainer = Trainer(config, dataset, case, arguments.devices)
            if case == "float32" and arguments.save:
                trainer.advance(0, STEPS // 2)
                with saving.CheckpointWriter(arguments.save) as writer:
                    writer.save(STEPS // 2, trainer.state, {})
                trainer.advance(STEPS // 2, STEPS // 2 + 1)
                trainer.write(arguments.out / "next_there.npz")
                trainer.advance(STEPS // 2 + 1, STEPS)
            else:
                trainer.advance(0, STEPS)
            trainer.write(arguments.out / f"{case}.npz")
    if arguments.checkpoint and trainer is not None:
        found = checkpoints.newest(arguments.checkpoint)
        assert found is not None
        trainer.losses.clear()
        trainer.state = checkpoints.restore(found, trainer.state)
        trainer.advance(found.step, found.step + 1)
        trainer.write(arguments.out / "next.npz")
    if arguments.checkpoint:
        evaluate(config, dataset, arguments.out)


def evaluate(config: Any, dataset: Any, out: Path) -> None:
    """Evaluates fresh weights on the test split, whose 360 examples fill no whole number of batches."""
    import json

    import jax

    from mpisjax.configuration import makers
    from mpisjax.storage import processes

    net = makers.make_network(config, dataset)
    variables = jax.jit(lambda: makers.initial_variables(config, net, dataset))()
    score = makers.make_evaluator(config, net, dataset, num_steps=4)(jax.device_get(variables), dataset.test)
    if processes.is_primary():
        (out / "evaluation.json").write_text(json.dumps(score._asdict()))


if __name__ == "__main__":
    main()
