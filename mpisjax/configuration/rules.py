"""The rules that settings obey, alone and together."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import ml_collections

from mpisjax.configuration.settings import SETTINGS, Setting
from mpisjax.errors import UserError

# The settings, as group and name, that can hold a `package.module:function`, and what else they can name.
_NAMES = {
    ("model", "name"): ("mpis",),
    ("train", "optimizer"): ("sgd", "adamw", "lion"),
    ("train", "schedule"): ("cosine", "step"),
}
# Tuples of something else than whole numbers.
_TUPLES: dict[str, tuple[tuple[type, ...], str]] = {
    "train.milestones": ((int, float), "numbers above 0, as (0.5, 0.75)"),
    "model.neurons": ((str,), "kinds of neuron, as ('lif', 'ternary')"),
}
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses settings of training that cannot be.

    Raises:
        UserError: In one sentence that names the setting.
    """
    for key, setting in SETTINGS.items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        _check_numbers(key, value)
        _check_value(key, value, setting)
    train, forward = config.train, config.forward
    for (group, name), known in _NAMES.items():
        value = config[group][name]
        if value not in known and not _FUNCTION.fullmatch(value):
            raise UserError(f"{group}.{name} is {value!r}: choose {', '.join(known)} or package.module:function.")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"train.accumulate is {train.accumulate}: choose a divisor of train.batch_size, which is "
            f"{train.batch_size}."
        )
    if train.method == "bptt" and (forward.mode != "spikes" or forward.settle_tol):
        raise UserError(
            "train.method is 'bptt', which differentiates a simulation of fixed length: set forward.mode to "
            "'spikes' and forward.settle_tol to 0."
        )
    if forward.returns == "spikes" and (forward.mode != "spikes" or train.method != "implicit"):
        raise UserError(
            "forward.returns is 'spikes', which trains the classifier on the rates of an implicit method's spikes: set "
            "forward.mode to 'spikes' and train.method to 'implicit'."
        )


def check_trusted(config: ml_collections.ConfigDict, origin: str, trusted: bool | Collection[str]) -> None:
    """Refuses the settings of a stored file that name a function, since its module would be imported.

    Args:
        config: The settings that were stored.
        origin: Where, for the message.
        trusted: The functions that the user has named, or True: whatever is named.

    Raises:
        UserError: They name a function that the user has not named.
    """
    for group, name in _NAMES:
        value = config[group][name]
        if trusted is not True and ":" in value and (not trusted or value not in trusted):
            raise UserError(
                f"{origin} names {value!r} as its {group}.{name}, and the code of that module would run: if you trust "
                "it, add --trust (in Python trust=True)"
            )


def _check_numbers(key: str, value: Any) -> None:
    """Refuses numbers that no setting can have: of another type within a tuple, not finite, too large to count in."""
    kinds, wanted = _TUPLES.get(key, ((int,), "whole numbers above 0, as (16, 32)"))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(value, tuple) and not (type(number) in kinds and (isinstance(number, str) or number > 0)):
            raise UserError(f"{key} is {value!r}: give {wanted}.")
        if isinstance(number, int | float) and not abs(number) < 2**31:
            raise UserError(f"{key} is {value}: set it to a number below 2**31.")


def _check_value(key: str, value: Any, setting: Setting) -> None:
    """Refuses a value that the table of settings rules out."""
    if setting.choices and value not in setting.choices:
        raise UserError(f"{key} is {value!r}: choose {' or '.join(map(repr, setting.choices))}.")
    least, above, below = setting.least, setting.above, setting.below
    if least is not None and below is not None and not least <= value < below:
        raise UserError(f"{key} is {value}: set it in [{least:g}, {below:g}).")
    if least is not None and not value >= least:
        raise UserError(f"{key} is {value}: set it to {f'at least {least:g}' if least else '0 or more'}.")
    if above is not None and not value > above:
        raise UserError(f"{key} is {value}: set it above {above:g}.")
