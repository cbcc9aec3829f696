"""The digits with a network that compiles in seconds, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from mpisjax.configuration import config_files

SMALL = {
    "model.stem": (4,),
    "model.layers": (4,),
    "model.num_streams": 1,
    "model.stride_layer": 0,
    "model.fusion_layer": 1,
    "forward.num_steps": 2,
    "train.epochs": 1,
    "train.warmup_epochs": 0.5,
}


def small_config(settings: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """The digits' config, small; settings by dotted key."""
    config = config_files.load_config("digits")
    config.update_from_flattened_dict({**SMALL, **(settings or {})})
    return config
