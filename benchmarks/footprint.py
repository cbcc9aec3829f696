"""Peak resident memory of training and evaluating a config, phase by phase, beside XLA's figure of temporary memory.

Each in a process of its own, as `train.py` and `evaluate.py` are, with all data, a few batches, and nothing cached:

    python -m benchmarks.footprint CONFIG train|evaluate [DATA_DIR]   # one row, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpisjax_launch
from benchmarks.resident import forget_peak, peak_mib

ROOT = Path(__file__).resolve().parents[1]
# A config of each size of network and each way to train it, of the sets that come with their libraries.
EMBEDDED = ("digits", "saccade_digits", "saccade_digits:low")
# And of those that need files; the last have the paper's sizes.
FROM_FILES = (
    "fashion_mnist",
    "fashion_mnist:t30",
    "fashion_mnist:low",
    "fashion_mnist:ide_t30",
    "fashion_mnist:large_t1",
    "nmnist:subset",
    "nmnist:subset_low",
    "cifar100:laptop",
    "cifar100:laptop_low",
    "cifar100:small",
    "cifar100",
)
STEPS = 2


def measure(data_dir: str = "", *, quick: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Yields a row for training and one for evaluation of each config, as soon as they are measured.

    Args:
        data_dir: As of the loader section; without it only the sets that come with their libraries.
        quick: The first config alone.
    """
    from benchmarks.loader import those_at_hand

    names = EMBEDDED[:1] if quick else (*EMBEDDED, *(those_at_hand(FROM_FILES, data_dir) if data_dir else ()))
    for name in names:
        yield [run(name, what, data_dir) for what in ("train", "evaluate")]


def run(name: str, what: str, data_dir: str = "") -> dict[str, Any]:
    """A row, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.footprint", name, what, data_dir]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def footprint(name: str, what: str, data_dir: str) -> dict[str, Any]:
    """A row: the largest resident size of this process in each phase, in MiB.

    Args:
        name: A config.
        what: "train": two steps, their checkpoint, and a validation of one batch; "evaluate": two batches of spikes.
        data_dir: As of the loader section.
    """
    phases: dict[str, float] = {}

    def ends(phase: str) -> None:
        phases[phase] = peak_mib()
        forget_peak()

    from benchmarks.loader import config_of
    from mpisjax.configuration import makers
    from mpisjax.nn import model
    from mpisjax.training.run import assemble

    config = config_of(name, data_dir)
    makers.prepare_cores(config)
    ends("import")
    parts = assemble(config)
    ends("data")
    temporary = _train(config, parts, ends) if what == "train" else _evaluate(config, parts, ends)
    return {
        "config": name,
        "what": what,
        "parameters": model.parameter_count({"params": parts.state.params}),
        "batch": config.train.batch_size if what == "train" else config.eval.batch_size,
        "temporary_MiB": temporary / 2**20,
        **phases,
        "peak_MiB": max(phases.values()),
    }


def _train(config: Any, parts: Any, ends: Callable[[str], None]) -> int:
    """Trains as `train.py` does; gives XLA's bytes of temporary memory."""
    from benchmarks.timing import Compiled, compiled
    from mpisjax.configuration import makers
    from mpisjax.training import fit
    from mpisjax.training.loop import LoopSettings
    from mpisjax.training.state import evaluated_variables

    train_step = makers.make_train_step(config, parts.net, parts.dataset, parts.feed.steps_per_epoch, parts.mesh)
    examiner = makers.make_evaluator(config, parts.net, parts.dataset)
    made: list[Compiled] = []

    def step(state: Any, batch: Any) -> Any:
        if not made:
            made.append(compiled(train_step, state, batch))
            ends("compile")
        return made[0].call(state, batch)

    def validate(state: Any) -> Any:
        ends("steps")
        return examiner(evaluated_variables(state), _first(parts, config.eval.batch_size))

    class Few:
        steps_per_epoch = STEPS
        batch = staticmethod(parts.feed.batch)

    with tempfile.TemporaryDirectory() as folder:
        settings = LoopSettings(1, config.train.batch_size, log_every=1)
        fit.train(settings, folder, state=parts.state, train_step=step, feed=Few(), eval_fn=validate)
    ends("validation")
    return made[0].temporary


def _evaluate(config: Any, parts: Any, ends: Callable[[str], None]) -> int:
    """Evaluates as `evaluate.py` does; gives XLA's bytes of temporary memory."""
    from benchmarks.timing import compiled
    from mpisjax.configuration import makers
    from mpisjax.training import evaluation
    from mpisjax.training.state import evaluated_variables

    size, variables = config.eval.batch_size, evaluated_variables(parts.state)
    makers.make_evaluator(config, parts.net, parts.dataset)(variables, _first(parts, 2 * size))
    ends("steps")
    step = evaluation.make_eval_step(
        parts.net,
        parts.dataset,
        neuron=makers.make_neuron(config),
        forward=makers.make_spike_forward(config, parts.dataset.temporal),
        bptt=makers.make_bptt(config),
        mesh=makers.make_mesh(config, size),
    )
    return compiled(step, variables, next(evaluation.eval_batches(parts.dataset.train, size))).temporary


def _first(parts: Any, count: int) -> Any:
    """Examples to evaluate on: of the train split, which is the largest."""
    split = parts.dataset.train
    return type(split)(split.images[:count], split.labels[:count])


if __name__ == "__main__":
    mpisjax_launch.with_large_pages()
    print(json.dumps(footprint(*sys.argv[1:])))
