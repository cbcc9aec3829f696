"""Networks to train for the tables: config files with overrides, nothing that `train.py` cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from mpisjax.configuration import config_files, rules

ROOT = Path(__file__).resolve().parents[1]


class Net(NamedTuple):
    """A network to train.

    Attributes:
        name: The name of its runs' folders, unique within a scale.
        title: Its name in tables.
        data: The data set's name in tables.
        steps: Time steps T.
        config: Config file and variant, as `train.py --config` takes them.
        settings: Overrides by dotted key.
        examples: Size of the training split, which gives the number of steps without loading the data.
    """

    name: str
    title: str
    data: str
    steps: int
    config: str
    settings: Mapping[str, Any]
    examples: int

    def load(self, seed: int = 0) -> ml_collections.ConfigDict:
        """All settings of a run."""
        config = config_files.load_config(str(ROOT / self.config))
        config.update_from_flattened_dict({**self.settings, "seed": seed})
        rules.check(config)
        return config

    def command(self, seed: int = 0) -> str:
        """What trains the same network by hand."""
        overrides = {**self.settings, **({"seed": seed} if seed else {})}
        shown = [f'--config.{k}="{v}"' if isinstance(v, tuple) else f"--config.{k}={v}" for k, v in overrides.items()]
        return " ".join(["python train.py --config", self.config, *(s.replace(", ", ",") for s in shown)])

    def training_steps(self) -> int:
        """Training steps of a run."""
        train = self.load().train
        return train.epochs * (self.examples // train.batch_size)


class Pair(NamedTuple):
    """Two networks of equal size, to compare.

    Attributes:
        ours: The MPIS network.
        other: The baseline.
    """

    ours: Net
    other: Net
