"""Settings as a `ConfigDict`: the defaults, a config file's variants, the rules, and the objects that settings stand
for.

`mpisjax.settings` has the table of all settings. Importing this module imports no JAX.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from mpisjax.errors import UserError
from mpisjax.settings import SETTINGS, Setting

if TYPE_CHECKING:
    import jax

    from mpisjax.data import DataSet, Inputs

# What these settings can name beside `package.module:function`.
NETWORKS, OPTIMIZERS, SCHEDULES = ("mpis",), ("sgd", "adamw", "lion"), ("cosine", "step")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


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

    def fill(ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict) -> None:
        for key, value in ours.items():
            if key not in theirs:
                theirs[key] = value
            elif isinstance(value, ml_collections.ConfigDict):
                fill(value, theirs[key])

    with config.unlocked():
        if "neuron" in config and "initial_potential" not in config.neuron:
            config.neuron.initial_potential = 0.0  # neurons started from rest then
        fill(settings, config)
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back: plain dicts, and lists for tuples."""
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    return json.loads(json.dumps(tree))


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
                "mpisjax/settings.py for the settings and their types."
            ) from error
    config.name = f"{config.name}_{variant}"
    return config


def make_neuron(config: ml_collections.ConfigDict) -> Any:
    """The neuron's constants."""
    from mpisjax.neurons import LIF

    return LIF(**config.neuron)


def make_forward(config: ml_collections.ConfigDict, temporal: bool = False) -> Any:
    """The training forward."""
    from mpisjax.solvers import RateForward

    f = config.forward
    if f.mode == "rates":
        return RateForward(f.solver, f.max_steps, f.tol, f.history, f.damping)
    return make_spike_forward(config, temporal)


def make_spike_forward(config: ml_collections.ConfigDict, temporal: bool = False, num_steps: int | None = None) -> Any:
    """The spiking forward, of evaluation always and of training where `forward.mode` says so.

    Input over time has as many steps as frames.
    """
    from mpisjax.simulate import SpikeForward

    f = config.forward
    if temporal:
        return SpikeForward(None, residual_tol=f.residual_tol)
    return SpikeForward(f.num_steps if num_steps is None else num_steps, f.settle_tol or None, f.residual_tol)


def make_evaluation_solver(config: ml_collections.ConfigDict) -> Any:
    """The rate solver of evaluations: tight, whatever training got by with."""
    from mpisjax.solvers import RateForward

    return RateForward("anderson", max_steps=60, tol=1e-3, damping=config.forward.damping)


def make_adjoint(config: ml_collections.ConfigDict) -> Any:
    """The adjoint solver."""
    from mpisjax.solvers import Adjoint

    return Adjoint(**config.adjoint)


def make_bptt(config: ml_collections.ConfigDict) -> Any:
    """How the simulation is differentiated through time; None where training is implicit."""
    from mpisjax.baselines.bptt import BPTT

    return BPTT(**config.bptt) if config.train.method == "bptt" else None


def make_network(config: ml_collections.ConfigDict, dataset: DataSet) -> Any:
    """The network for a data set.

    Raises:
        UserError: `model.name` names none, or the network lacks a method.
    """
    import jax.numpy as jnp

    from mpisjax.nn import MPIS, as_module

    settings = dict(config.model)
    name, dtype = settings.pop("name"), settings.pop("dtype")
    if name != "mpis":
        return as_module(function_named("model.name", name)(dataset, config))
    settings["neuron"] = make_neuron(config) if config.model.neurons or config.model.learn_threshold else None
    wide = None if dtype == "float32" else jnp.bfloat16
    return MPIS(num_classes=dataset.num_classes, temporal=dataset.temporal, dtype=wide, **settings)


def function_named(key: str, value: str) -> Any:
    """The function that a setting names as `package.module:function`; modules of the working folder are found, too.

    Args:
        key: The setting.
        value: Its value.

    Raises:
        UserError: There is no such function, or its module fails.
    """
    module, _, name = value.partition(":")
    here = os.getcwd()
    sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{key} is {value!r}, but {module} cannot be imported ({why}): mend it") from error
    finally:
        sys.path.remove(here)
    # Nothing but functions of that very module: a config may come from somebody else's checkpoint.
    if not inspect.isfunction(found) or found.__module__ != module:
        raise UserError(f"{key} is {value!r}, but {module} defines no function {name}: name one that it defines.")
    return found


def check_trusted(config: ml_collections.ConfigDict, origin: str, trusted: bool | Collection[str]) -> None:
    """Refuses the settings of a stored file that name a function, since its module would be imported.

    Args:
        config: The settings that were stored.
        origin: Where, for the message.
        trusted: The functions that the user has named, or True: whatever is named.

    Raises:
        UserError: They name a function that the user has not named.
    """
    for key, value in (
        ("model.name", config.model.name),
        ("train.optimizer", config.train.optimizer),
        ("train.schedule", config.train.schedule),
    ):
        if trusted is not True and ":" in value and (not trusted or value not in trusted):
            raise UserError(
                f"{origin} names {value!r} as its {key}, and the code of that module would run: if you trust it, add "
                "--trust (in Python trust=True)"
            )


def make_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Any:
    """The learning rate of each step."""
    from mpisjax.training import state

    t = config.train
    steps, rise = t.epochs * steps_per_epoch, {"warmup_steps": round(t.warmup_epochs * steps_per_epoch)}
    if t.schedule == "cosine":
        return state.cosine(t.learning_rate, steps, **rise)
    if t.schedule == "step":
        return state.step_decay(t.learning_rate, steps, milestones=t.milestones, decay=t.decay, **rise)
    return function_named("train.schedule", t.schedule)(t.learning_rate, steps)


def make_optimizer(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Any:
    """The optimiser, an optax transformation.

    Raises:
        UserError: `train.optimizer` names none.
    """
    import optax

    from mpisjax.training import state

    t, schedule = config.train, make_schedule(config, steps_per_epoch)
    decays = {name: t[name] for name in ("weight_decay", "feedback_decay", "gradient_clip")}
    if t.optimizer == "sgd":
        return state.sgd(schedule, momentum=t.momentum, **decays)
    if t.optimizer in ("adamw", "lion"):
        return getattr(state, t.optimizer)(schedule, **decays)
    found = function_named("train.optimizer", t.optimizer)(schedule)
    if not isinstance(found, optax.GradientTransformation):
        raise UserError(
            f"train.optimizer is {t.optimizer!r}, which gives no optax transformation: return one, such as "
            "optax.adam(schedule)."
        )
    return found


def make_augmentation(config: ml_collections.ConfigDict) -> Any:
    """How images are changed in training."""
    from mpisjax.data import Augmentation

    return Augmentation(**{name: config.data.augment[name] for name in Augmentation._fields})


def make_mesh(config: ml_collections.ConfigDict, batch_size: int) -> jax.sharding.Mesh:
    """The devices that share a batch."""
    from mpisjax.training.devices import data_mesh

    return data_mesh(batch_size, config.devices.all_cores, config.devices.model_parallel)


def make_train_step(
    config: ml_collections.ConfigDict, network: Any, dataset: DataSet, steps_per_epoch: int, mesh: Any = None
) -> Any:
    """The training step; see `mpisjax.training.step.make_train_step`."""
    from mpisjax.training import loss, step

    return step.make_train_step(
        network,
        make_optimizer(config, steps_per_epoch),
        inputs=dataset,
        neuron=make_neuron(config),
        forward=make_forward(config, dataset.temporal),
        adjoint=make_adjoint(config),
        bptt=make_bptt(config),
        returns=config.forward.returns,
        schedule=make_schedule(config, steps_per_epoch),
        augmentation=make_augmentation(config),
        mixup=config.data.augment.mixup,
        label_smoothing=config.train.label_smoothing,
        class_weights=loss.class_weights_of(config.train.class_weights, dataset),
        jacobian_weight=config.train.jacobian_penalty,
        rate_weight=config.train.rate_penalty,
        averaging=config.train.ema,
        accumulate=config.train.accumulate,
        mesh=mesh,
    )


def counted_loops(config: ml_collections.ConfigDict, temporal: bool = False) -> list[str] | None:
    """The metrics that count the turns of a step's loops; see `mpisjax.training.step_runner.counted_loops`."""
    from mpisjax.training import step_runner

    return step_runner.counted_loops(
        make_forward(config, temporal),
        make_adjoint(config),
        through_time=config.train.method == "bptt",
        penalised=bool(config.train.jacobian_penalty),
    )


def make_examiner(config: ml_collections.ConfigDict, network: Any, inputs: Inputs, num_steps: int | None = None) -> Any:
    """Measures the network's spikes after `num_steps` time steps, or as many as configured, and every answer."""
    from mpisjax.training import evaluation

    return evaluation.make_examiner(
        network,
        inputs,
        neuron=make_neuron(config),
        forward=make_spike_forward(config, inputs.temporal, num_steps),
        bptt=make_bptt(config),
        batch_size=config.eval.batch_size,
        mesh=make_mesh(config, config.eval.batch_size),
    )


def make_evaluator(
    config: ml_collections.ConfigDict, network: Any, inputs: Inputs, num_steps: int | None = None
) -> Any:
    """The means of `make_examiner`."""
    examiner = make_examiner(config, network, inputs, num_steps)
    return lambda variables, split: examiner(variables, split).evaluation


def initial_variables(config: ml_collections.ConfigDict, network: Any, dataset: DataSet) -> dict[str, Any]:
    """Random weights by the seed."""
    from mpisjax.training import state

    shape = dataset.train.images.shape[1:]
    return state.initial_variables(network, config.seed, shape, make_neuron(config))


def init_state(config: ml_collections.ConfigDict, variables: dict[str, Any], steps_per_epoch: int) -> Any:
    """The training state before the first step."""
    from mpisjax.training import state

    optimizer = make_optimizer(config, steps_per_epoch)
    return state.init_state(variables, optimizer, seed=config.seed, averaging=bool(config.train.ema))


def _check_numbers(config: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Refuses numbers that no setting can have: of another type within a tuple, not finite, too large to count in."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            _check_numbers(value, f"{prefix}{key}.")
        for number in value if isinstance(value, tuple) else (value,):
            fraction = prefix + key == "train.milestones"
            kinds = (int, float) if fraction else (int,)
            if isinstance(value, tuple) and not (type(number) in kinds and number > 0):
                wanted = "numbers above 0, as (0.5, 0.75)" if fraction else "whole numbers above 0, as (16, 32)"
                raise UserError(f"{prefix}{key} is {value!r}: give {wanted}.")
            if isinstance(number, int | float) and not abs(number) < 2**31:
                raise UserError(f"{prefix}{key} is {value}: set it to a number below 2**31.")


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses settings of training that cannot be.

    Raises:
        UserError: In one sentence that names the setting.
    """
    _check_numbers(config)
    for key, setting in SETTINGS.items():
        _check_value(key, setting, config)
    train, forward = config.train, config.forward
    for key, value, known in (
        ("model.name", config.model.name, NETWORKS),
        ("train.optimizer", train.optimizer, OPTIMIZERS),
        ("train.schedule", train.schedule, SCHEDULES),
    ):
        if value not in known and not _FUNCTION.fullmatch(value):
            raise UserError(f"{key} is {value!r}: choose {', '.join(known)} or package.module:function.")
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


def _check_value(key: str, setting: Setting, config: ml_collections.ConfigDict) -> None:
    """Refuses a value that the table of settings rules out."""
    value = config
    for part in key.split("."):
        value = value[part]
    if setting.choices and value not in setting.choices:
        raise UserError(f"{key} is {value!r}: choose {' or '.join(map(repr, setting.choices))}.")
    least, above, below = setting.least, setting.above, setting.below
    if least is not None and below is not None and not least <= value < below:
        raise UserError(f"{key} is {value}: set it in [{least:g}, {below:g}).")
    if least is not None and not value >= least:
        raise UserError(f"{key} is {value}: set it to {f'at least {least:g}' if least else '0 or more'}.")
    if above is not None and not value > above:
        raise UserError(f"{key} is {value}: set it above {above:g}.")


def served_on_cpu(config: ml_collections.ConfigDict) -> bool:
    """Whether the compiled convolutions of a CPU serve the whole network, where there are any."""
    from mpisjax.cpu.compiled import serves

    return serves(config.model.dtype, (*config.model.stem, *config.model.layers))


def prepare_cores(config: ml_collections.ConfigDict) -> None:
    """Settles how the cores of a CPU share a batch; call it before JAX looks for its devices."""
    from mpisjax.cpu import cores

    whole = served_on_cpu(config) and config.devices.model_parallel == 1
    cores.prepare(served=whole, all_cores=config.devices.all_cores)
