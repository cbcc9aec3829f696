"""The objects that settings stand for: neuron, solvers, network, optimiser, step and evaluator.

What is slow to import waits until an object of it is made.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any

import ml_collections

from mpisjax.errors import UserError

if TYPE_CHECKING:
    import jax

    from mpisjax.data import DataSet, Inputs


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


def make_dataset(config: ml_collections.ConfigDict) -> DataSet:
    """The data set of a run, as `mpisjax.data.load` gives it."""
    from mpisjax.data import arrays, folders, load

    options = config.data.to_dict()
    del options["augment"]
    options["value_range"] = arrays.parse_range(options["value_range"])
    options["sensor_size"] = folders.parse_sensor(options["sensor_size"])
    return load(**options)


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


def served_on_cpu(config: ml_collections.ConfigDict) -> bool:
    """Whether the compiled convolutions of a CPU serve the whole network, where there are any."""
    from mpisjax.cpu.compiled import serves

    return serves(config.model.dtype, (*config.model.stem, *config.model.layers))


def prepare_cores(config: ml_collections.ConfigDict) -> None:
    """Settles how the cores of a CPU share a batch; call it before JAX looks for its devices."""
    from mpisjax.cpu import cores

    whole = served_on_cpu(config) and config.devices.model_parallel == 1
    cores.prepare(served=whole, all_cores=config.devices.all_cores)
