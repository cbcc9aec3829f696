"""Settings as a `ConfigDict`: the defaults, a config file's variants, and settings as JSON.

`settings` has the table of all settings, `rules` checks their values, `makers` makes the objects that they stand for,
and `config_files` reads config files and what the command line changes. Importing any of them imports no JAX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from mpisjax.configuration.settings import SETTINGS
from mpisjax.errors import UserError

# A second stage, which goes on from trained weights: through time, on the spikes' own answers. Frames are their own
# steps; a constant image is answered after 1, 2 and 4. Without a limit on its gradient a stage on few images has ended
# at chance.
LOW_FRAMES = {
    "train.method": "bptt",
    "train.epochs": 10,
    "train.learning_rate": 0.02,
    "train.warmup_epochs": 0.5,
}
LOW_IMAGES = {
    **LOW_FRAMES,
    "forward.mode": "spikes",
    "forward.num_steps": 4,
    "bptt.times": (1, 2, 4),
    "train.gradient_clip": 1.0,
}


def base() -> ml_collections.ConfigDict:
    """The settings that every config file starts from, locked: a misspelt one cannot be added."""
    tree: dict[str, Any] = {}
    for key, setting in SETTINGS.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = setting.default
    return ml_collections.ConfigDict(tree).lock()


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config that an earlier version wrote, with the defaults of the settings that it did not know."""
    settings = base()
    with settings.unlocked(), settings.ignore_type():
        if "neuron" in config:
            settings.neuron.initial_potential = 0.0  # where it is not said, neurons started from rest
        settings.update(config)
    return settings


def to_plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as JSON gives it back: plain dicts, and lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def from_plain(tree: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config that `to_plain` was given: lists become tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(tree))


def with_variant(
    config: ml_collections.ConfigDict, variants: Mapping[str, Mapping[str, Any]], variant: str | None
) -> ml_collections.ConfigDict:
    """Applies one of a config file's variants, as `--config FILE:VARIANT` names it.

    Args:
        config: the settings without a variant; changed in place.
        variants: by name, the settings that differ, by dotted key.
        variant: one of them; None or empty for none.

    Returns:
        The config, its name followed by the variant's so that their runs have folders of their own.

    Raises:
        UserError: there is no such variant, or it sets what is no setting, or to a value of another type.
    """
    if not variant:
        return config
    if variant not in variants:
        known = f"choose from {', '.join(variants)}, or leave it out" if variants else "leave it out"
        raise UserError(f"the config {config.name!r} has no variant {variant!r}: {known}.")
    for key, value in variants[variant].items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the variant {variant!r} of the config {config.name!r} cannot set {key} to {value!r}: see "
                "mpisjax/configuration/settings.py for the settings and their types."
            ) from error
    config.name = f"{config.name}_{variant}"
    return config
