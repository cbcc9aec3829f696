"""Every setting with its default, and the objects that settings stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from mpisjax.errors import UserError

if TYPE_CHECKING:
    from mpisjax.data import DataSet


def base() -> ml_collections.ConfigDict:
    """The settings that every config file starts from, locked: a misspelt one cannot be added."""
    c = ml_collections.ConfigDict
    settings = c(
        {
            "name": "unnamed",
            "seed": 0,
            "data": c(
                {
                    "name": "digits",
                    "dir": "",  # folder with the original files; empty: prepared data or a download
                    "cache_dir": "",  # decoded arrays; empty: the user's cache folder
                    "source": "auto",  # auto, tfds, files or download
                    "num_validation": 0,  # examples held out of train
                    "split_seed": 0,
                    "crop": 0,  # event sets: side of the centre crop, 0 for none
                    "num_frames": 30,  # event sets
                    "frames": "count",  # event sets: count or binary
                    "binning": "time",  # event sets: frames of equal time or of equal event count
                    "denoise_us": 0.0,  # event sets
                    "augment": c(
                        {
                            "flip": False,  # mirror with probability 1/2
                            "rotate": 0.0,  # up to so many degrees
                            "zoom": 0.0,  # by a factor of up to 1 + zoom, or its inverse
                            "shift": 0,  # up to so many pixels
                            "cutout": 0,  # side of a blanked square
                            "mixup": 0.0,  # of the beta distribution
                        }
                    ),
                }
            ),
            "model": c(
                {
                    "stem": (16,),
                    "stem_strides": (1,),
                    "layers": (32, 48),
                    "num_streams": 2,
                    "fusion_layer": 2,
                    "stride_layer": 2,
                    "kernel_size": 3,
                    "feedback_gain": 0.5,  # where the gain of the feedback's weight norm starts
                    "feedback_norm": "weight",  # weight, or spectral: the feedback's operator norm stays below 1
                    "head": "fused",  # fused or smallest
                    "dropout": 0.0,
                    "momentum": 0.9,  # of batch normalisation's running statistics
                    "dtype": "float32",  # float32 or bfloat16: currents and rates
                }
            ),
            "neuron": c({"threshold": 1.0, "leak": 1.0, "initial_potential": 0.0}),
            "forward": c(
                {
                    "mode": "spikes",  # spikes (the paper's) or rates; evaluation always reports both paths
                    "num_steps": 30,  # spikes: time steps T
                    "settle_tol": 0.0,  # spikes: stop when the rates settle to this; 0 runs all steps
                    "solver": "picard",  # rates: picard or anderson
                    "max_steps": 12,  # rates
                    "tol": 1e-2,  # rates
                    "history": 3,  # rates, anderson
                    "damping": 0.0,  # rates
                    "returns": "equivalent",  # what the classifier is trained on: equivalent, or spikes
                }
            ),
            "adjoint": c({"solver": "neumann", "max_steps": 12, "tol": 1e-2, "history": 5, "damping": 0.0}),
            "bptt": c(
                {
                    "surrogate": "triangular",  # rectangular, triangular, arctan or sigmoid
                    "readout": "rate",  # what the classifier sees: rate or membrane
                    "remat": False,  # compute each step again in the backward pass, to save memory
                }
            ),
            "train": c(
                {
                    "method": "implicit",  # implicit, or bptt: the simulation differentiated through time
                    "init_from": "",  # a run's folder or a pretrained network's name: start from its weights
                    "epochs": 10,
                    "batch_size": 128,
                    "accumulate": 1,  # passes over parts of the batch to a step; each has its own batch statistics
                    "learning_rate": 0.1,
                    "momentum": 0.9,
                    "weight_decay": 5e-4,  # of kernels alone, not of gains, scales and shifts
                    "feedback_decay": 0.0,  # of the gains that scale the feedback, which the above leaves out
                    "warmup_epochs": 1.0,
                    "schedule": "cosine",  # cosine or step
                    "milestones": (0.5, 0.75),  # step: fractions of the run at which the rate falls
                    "decay": 0.1,  # step: by this factor
                    "label_smoothing": 0.0,
                    "gradient_clip": 0.0,  # global norm; 0 for none
                    "jacobian_penalty": 0.0,  # weight of ||J||_F^2 / n of the equivalent map; 0 for none
                    "ema": 0.0,  # decay of the averaged weights and statistics that evaluation uses; 0 for none
                    "test_at_end": True,  # False leaves the test split unread
                    "log_every": 50,
                    "checkpoint_every": 0,  # also every so many steps within an epoch
                    "checkpoint_seconds": 20.0,  # epochs that end sooner after a save are saved only if best or last;
                    # grows to a twentieth of the run's time, at most thirty-fold
                    "keep_checkpoints": 2,
                    "max_skipped": 10,
                }
            ),
            "eval": c({"batch_size": 256}),
            "devices": c(
                {
                    "all_cores": True,  # CPU: the cores share a batch (mpisjax/cpu/cores.py); False: one core
                    "model_parallel": 1,  # so many devices share each layer's channels; 1: the batch alone is split
                }
            ),
        }
    )
    return settings.lock()


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
                "mpisjax/configuration.py for the settings and their types."
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
    if f.mode != "spikes":
        raise UserError(f"forward.mode is {f.mode!r}: choose 'spikes' or 'rates'.")
    return make_spike_forward(config, temporal)


def make_spike_forward(
    config: ml_collections.ConfigDict, temporal: bool = False, num_steps: int | None = None
) -> Any:
    """The spiking forward, of evaluation always and of training where `forward.mode` says so.

    Input over time has as many steps as frames.
    """
    from mpisjax.simulate import SpikeForward

    f = config.forward
    if temporal:
        return SpikeForward(None)
    if f.settle_tol < 0:
        raise UserError(f"forward.settle_tol is {f.settle_tol}: set it above 0, or to 0 to run every step.")
    return SpikeForward(f.num_steps if num_steps is None else num_steps, f.settle_tol or None)


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
    """The network for a data set."""
    import jax.numpy as jnp

    from mpisjax.nn.mpis import MPIS

    settings = dict(config.model)
    name = settings.pop("dtype")
    if name not in ("float32", "bfloat16"):
        raise UserError(f"model.dtype is {name!r}: choose 'float32' or 'bfloat16'.")
    dtype = None if name == "float32" else jnp.bfloat16
    return MPIS(num_classes=dataset.num_classes, temporal=dataset.temporal, dtype=dtype, **settings)


def _check_numbers(config: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Refuses numbers that no setting can have: of another type within a tuple, not finite, too large to count in."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            _check_numbers(value, f"{prefix}{key}.")
        for number in value if isinstance(value, tuple) else (value,):
            fraction = prefix + key == "train.milestones"
            kinds = (int, float) if fraction else (int,)
            if isinstance(value, tuple) and not (type(number) in kinds and number > 0):
                wanted = (
                    "numbers above 0, as (0.5, 0.75)" if fraction else "whole numbers above 0, as (16, 32)"
                )
                raise UserError(f"{prefix}{key} is {value!r}: give {wanted}.")
            if isinstance(number, int | float) and not abs(number) < 2**31:
                raise UserError(f"{prefix}{key} is {value}: set it to a number below 2**31.")


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses settings of training that cannot be.

    Raises:
        UserError: in one sentence that names the setting.
    """
    _check_numbers(config)
    t = config.train
    for key, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("accumulate", 1),
        ("log_every", 1),
        ("keep_checkpoints", 1),
        ("max_skipped", 1),
    ):
        if t[key] < least:
            raise UserError(f"train.{key} is {t[key]}: set it to at least {least}.")
    if t.batch_size % t.accumulate:
        raise UserError(
            f"train.accumulate is {t.accumulate}: choose a divisor of train.batch_size, which is {t.batch_size}."
        )
    if config.devices.model_parallel < 1:
        raise UserError(
            f"devices.model_parallel is {config.devices.model_parallel}: set it to at least 1 (whole layers on every "
            "device)."
        )
    if t.method not in ("implicit", "bptt"):
        raise UserError(f"train.method is {t.method!r}: choose 'implicit' or 'bptt'.")
    if t.method == "bptt" and (config.forward.mode != "spikes" or config.forward.settle_tol):
        raise UserError(
            "train.method is 'bptt', which differentiates a simulation of fixed length: set forward.mode to "
            "'spikes' and forward.settle_tol to 0."
        )
    if t.schedule not in ("cosine", "step"):
        raise UserError(f"train.schedule is {t.schedule!r}: choose 'cosine' or 'step'.")
    if not t.learning_rate > 0:
        raise UserError(f"train.learning_rate is {t.learning_rate}: set it above 0.")
    for key in ("momentum", "label_smoothing", "ema"):
        if not 0 <= t[key] < 1:
            raise UserError(f"train.{key} is {t[key]}: set it in [0, 1).")
    for key in (
        "weight_decay",
        "feedback_decay",
        "warmup_epochs",
        "gradient_clip",
        "jacobian_penalty",
        "checkpoint_every",
        "checkpoint_seconds",
    ):
        if not t[key] >= 0:
            raise UserError(f"train.{key} is {t[key]}: set it to 0 or more.")
    for key in ("rotate", "zoom", "shift", "cutout", "mixup"):
        if not config.data.augment[key] >= 0:
            raise UserError(f"data.augment.{key} is {config.data.augment[key]}: set it to 0 or more.")
    returns = config.forward.returns
    if returns not in ("equivalent", "spikes"):
        raise UserError(f"forward.returns is {returns!r}: choose 'equivalent' or 'spikes'.")
    if returns == "spikes" and (config.forward.mode != "spikes" or t.method != "implicit"):
        raise UserError(
            "forward.returns is 'spikes', which trains the classifier on the rates of an implicit method's spikes: set "
            "forward.mode to 'spikes' and train.method to 'implicit'."
        )
    if config.eval.batch_size < 1:
        raise UserError(f"eval.batch_size is {config.eval.batch_size}: set it to at least 1.")
