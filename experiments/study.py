"""What every experiment works with: a scale, folders, and the training runs it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_collections
import numpy as np

from experiments.nets import Net
from experiments.rows import Rows
from experiments.scales import Scale
from mpisjax.storage.preemption import Preempted, Stopper

if TYPE_CHECKING:
    import jax

    from mpisjax.data import DataSet
    from mpisjax.neurons import LIF
    from mpisjax.nn.mpis import MPIS
    from mpisjax.solvers import RateForward
    from mpisjax.training.fit import FitResult


class Trained(NamedTuple):
    """A network after training.

    Attributes:
        config: All settings.
        dataset: The data.
        network: The module.
        neuron: Its neurons.
        solver: The rate solver of evaluations.
        variables: Parameters and statistics of the best state.
    """

    config: ml_collections.ConfigDict
    dataset: DataSet
    network: MPIS
    neuron: LIF
    solver: RateForward
    variables: dict[str, Any]

    def first(self, split: str, count: int) -> tuple[jax.Array, jax.Array]:
        """`first_examples` of the network's data."""
        return first_examples(self.dataset, split, count)


def first_examples(dataset: DataSet, split: str, count: int) -> tuple[jax.Array, jax.Array]:
    """The first examples of a split: images, as a network takes them, and labels.

    Args:
        dataset: The data.
        split: "train" or "test".
        count: How many examples; all of a shorter split.
    """
    import jax.numpy as jnp

    from mpisjax.data import prepare_images

    examples = getattr(dataset, split)
    chosen = np.arange(min(count, len(examples.labels)))
    images = jnp.asarray(np.asarray(examples.images[chosen]))
    return prepare_images(images, dataset), jnp.asarray(examples.labels[chosen])


class Study:
    """What every experiment works with.

    Args:
        scale: What is trained and measured.
        out: Folder for results and training runs.
        data_dir: Folder of the data sets' files, or of folders named after them; empty for downloads.
        stopper: Says whether a signal asked to stop.
        timing: False leaves times out, for a machine that is not idle.
        flags: The command line's flags, as tables show them.

    Attributes:
        scale: What is trained and measured.
        timing: Whether times are measured.
    """

    def __init__(
        self,
        scale: Scale,
        out: Path,
        data_dir: str,
        stopper: Stopper,
        timing: bool = True,
        flags: str = "",
    ) -> None:
        self.scale, self.timing = scale, timing
        self._out, self._data_dir, self._stopper, self._flags = out, data_dir, stopper, flags
        self._restored: dict[tuple[str, int], Trained] = {}

    def rows(self, experiment: str, **header: Any) -> Rows:
        """An experiment's finished rows, and what its table needs to know beside them."""
        common = {"experiment": experiment, "scale": self.scale.name, "seeds": list(self.scale.seeds)}
        command = f"python -m experiments {experiment} --scale {self.scale.name}{self._flags}"
        header = {**common, "command": command, **header}
        return Rows(self.folder(experiment) / "results.json", header, self._stopper)

    def folder(self, experiment: str) -> Path:
        """An experiment's folder."""
        return self._out / experiment

    def config(self, net: Net, seed: int) -> ml_collections.ConfigDict:
        """The settings of a run, with the folder of the data that the command line names."""
        from benchmarks.loader import find_data

        return find_data(net.load(seed), self._data_dir)

    def dataset(self, config: ml_collections.ConfigDict) -> DataSet:
        """The data of a config, from where the command line says."""
        from benchmarks.loader import find_data
        from mpisjax.configuration import makers

        return makers.make_dataset(find_data(config.copy_and_resolve_references(), self._data_dir))

    def settings(self, net: Net, seed: int = 0, **more: Any) -> dict[str, Any]:
        """Everything that a row of a network depends on."""
        from flax.traverse_util import flatten_dict

        from mpisjax import configuration
        from mpisjax.storage import record

        flat = flatten_dict(configuration.to_plain(net.load(seed)), sep=".")
        return {**{k: v for k, v in flat.items() if k not in record.FREE_KEYS}, **more}

    def workdir(self, net: Net, seed: int) -> Path:
        """The folder of a run; experiments that need the same run share it."""
        epochs = net.load(seed).train.epochs
        return self._out / "training" / f"{net.name}_{epochs}epochs_seed{seed}"

    def train_rows(self, rows: Rows, net: Net) -> None:
        """Trains a network for every seed, a row each."""
        self.seed_rows(rows, net, partial(self.train, net))

    def seed_rows(self, rows: Rows, net: Net, compute: Callable[[int], dict[str, Any]]) -> None:
        """A row for every seed of this command; rows of other seeds stay, so that each may have its own command."""
        for seed in rows.seeds:
            key, settings = f"{net.name} seed {seed}", self.settings(net, seed)
            if seed in self.scale.seeds:
                rows.row(key, settings, partial(compute, seed))
            else:
                rows.keep(key, seed, settings)

    def tested(self, net: Net, times: Sequence[int], seed: int) -> dict[str, Any]:
        """Trains a network, or continues its run, and measures it on the test split after each of `times` steps."""
        from mpisjax.nn.model import parameter_count
        from mpisjax.training.evaluation import as_json
        from mpisjax.training.run import evaluate_at, restore_best

        self.finished(net, seed)
        config = self.config(net, seed)
        parts, state, _ = restore_best(self.workdir(net, seed), config)
        return {
            "tests": [as_json(evaluate_at(config, parts, state, parts.dataset.test, count)) for count in times],
            "parameters": parameter_count({"params": state.params}),
            "command": net.command(seed),
        }

    def train(self, net: Net, seed: int) -> dict[str, Any]:
        """Trains a network, or continues its run, and returns what was measured on the test split."""
        from mpisjax.nn.model import parameter_count
        from mpisjax.training.evaluation import as_json

        result = self.finished(net, seed)
        test = {k: v for k, v in (result.test or {}).items() if k in ("accuracy", "accuracy_spikes", "residual")}
        found = as_json(_Fields(test))
        return {
            **found,
            "parameters": parameter_count({"params": result.state.params}),
            "command": net.command(seed),
        }

    def finished(self, net: Net, seed: int) -> FitResult:
        """Trains a network, or continues its run, and returns how that ended."""
        from mpisjax.training.run import run

        result = run(self.config(net, seed), self.workdir(net, seed), self._stopper)
        if result.stopped:
            raise Preempted(self._stopper.requested or "a signal")
        return result

    def trained(self, net: Net, seed: int) -> Trained:
        """The best state of a run, which is trained first if it is not yet."""
        import jax

        from mpisjax.configuration import makers
        from mpisjax.training.run import restore_best
        from mpisjax.training.state import evaluated_variables

        key = (net.name, seed)
        if key not in self._restored:
            self.train(net, seed)
            config = self.config(net, seed)
            parts, state, _ = restore_best(self.workdir(net, seed), config)
            self._restored[key] = Trained(
                config=config,
                dataset=parts.dataset,
                network=parts.net,
                neuron=makers.make_neuron(config),
                solver=makers.make_evaluation_solver(config),
                variables=jax.device_get(evaluated_variables(state)),
            )
        return self._restored[key]


def described(net: Net) -> dict[str, Any]:
    """What a table says of a network, as JSON can hold it."""
    known = {"name": net.name, "title": net.title, "data": net.data, "steps": net.steps}
    return {**known, "epochs": net.load().train.epochs, "command": net.command()}


class _Fields:
    """A dict in the shape that `as_json` takes."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def _asdict(self) -> dict[str, Any]:
        return self._fields
