"""The training state, optimisers and learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpisjax.neurons import LIF
from mpisjax.nn import model

Array = jax.Array


class TrainState(NamedTuple):
    """All that a run is, beside its config and data.

    Attributes:
      step: int32 scalar, steps taken (skipped ones too: they used up their batch).
      params: the network's parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: the optimiser's.
      ema: averaged parameters and running statistics (`{"params": ..., "batch_stats": ...}`), () where none are
        kept.
      skipped: int32 scalar, steps in a row whose loss or gradient was not finite.
      rng: a random key; every step folds its number in. It keeps its implementation, whatever JAX's default is.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    skipped: Array
    rng: Array


def initial_variables(network: Any, seed: int, shape: tuple[int, ...], neuron: LIF) -> dict[str, Any]:
    """Random weights: float32, whether or not JAX's x64 is on, but for a float64 network.

    Args:
      network: the network.
      seed: of the weights.
      shape: of an example, [H, W, C] or [T, H, W, C].
      neuron: its threshold scales the rates.
    """
    images = jnp.zeros((shape[0], 1, *shape[1:]) if network.temporal else (1, *shape))
    variables = model.init_variables(network, jax.random.key(seed), images, neuron)
    if network.dtype == jnp.float64:
        return variables

    def narrow(leaf: Any) -> Any:
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(narrow, variables)


def init_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    averaging: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.
      optimizer: the one that the step has.
      seed: of augmentation and dropout.
      averaging: whether averaged weights are kept.
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averaged = {"params": params, "batch_stats": batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, averaged) if averaging else (),
        skipped=jnp.zeros((), jnp.int32),
        rng=jax.random.key(seed + 1),
    )


def evaluated_variables(state: TrainState) -> dict[str, Any]:
    """What evaluation takes of a state: the averages where they are kept, parameters and running statistics alike.

    Running statistics describe the activity under the parameters they were gathered with; under averaged ones they
    have to be averaged too.
    """
    return {"params": state.params, "batch_stats": state.batch_stats} if state.ema == () else state.ema


def cosine(learning_rate: float, num_steps: int, *, warmup_steps: int = 0) -> optax.Schedule:
    """A linear rise, then a cosine down to zero.

    Args:
        learning_rate: The highest.
        num_steps: Steps of the whole run.
        warmup_steps: Steps of the rise; they count in `num_steps`.
    """
    warmup = min(warmup_steps, max(num_steps - 1, 0))
    return _after_rise(optax.cosine_decay_schedule(learning_rate, max(num_steps - warmup, 1)), learning_rate, warmup)


def step_decay(
    learning_rate: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    decay: float = 0.1,
) -> optax.Schedule:
    """A linear rise, then a constant that falls by a factor at each milestone.

    Args:
        learning_rate: The highest.
        num_steps: Steps of the whole run.
        warmup_steps: Steps of the rise; they count in `num_steps`.
        milestones: Shares of the run after which the rate falls.
        decay: The factor.
    """
    warmup = min(warmup_steps, max(num_steps - 1, 0))
    falls = {max(round(m * num_steps) - warmup, 0): decay for m in milestones}
    return _after_rise(optax.piecewise_constant_schedule(learning_rate, falls), learning_rate, warmup)


def _after_rise(schedule: optax.Schedule, learning_rate: float, warmup: int) -> optax.Schedule:
    rise = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup)
    joined = optax.join_schedules([rise, schedule], [warmup]) if warmup else schedule
    # optax multiplies the count by floats, which JAX's strict type promotion allows of floats alone.
    return lambda count: joined(jnp.asarray(count, jnp.float32))


def sgd(
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    feedback_decay: float = 0.0,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum; weight decay on kernels alone, not on gains, scales and shifts.

    Args:
        schedule: The learning rate.
        momentum: 0: none.
        weight_decay: Of arrays with two axes or more.
        feedback_decay: Of the gains of the feedback convolutions Trans. They have no batch normalisation after them, so
            their gains set how strongly the streams feed back, and kernels do not.
        gradient_clip: The largest global norm of the gradient; 0: no limit.
    """
    return optax.chain(
        _clip(gradient_clip),
        _decays(weight_decay, feedback_decay),
        optax.sgd(schedule, momentum=momentum or None, nesterov=bool(momentum)),
    )


def adamw(schedule: optax.ScalarOrSchedule, **decays: float) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (I. Loshchilov and F. Hutter, 2019); arguments as of `sgd`, less momentum."""
    return _decoupled(optax.scale_by_adam(), schedule, **decays)


def lion(schedule: optax.ScalarOrSchedule, **decays: float) -> optax.GradientTransformation:
    """Lion, the sign of a momentum (X. Chen et al., 2023); arguments as of `sgd`, less momentum."""
    return _decoupled(optax.scale_by_lion(), schedule, **decays)


def _decoupled(
    direction: optax.GradientTransformation,
    schedule: Any,
    weight_decay: float = 5e-4,
    feedback_decay: float = 0.0,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    decays = _decays(weight_decay, feedback_decay)
    return optax.chain(_clip(gradient_clip), direction, decays, optax.scale_by_learning_rate(schedule))


def _clip(norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _decays(weight_decay: float, feedback_decay: float) -> optax.GradientTransformation:
    decays = [optax.add_decayed_weights(weight_decay, mask=_kernels)]
    if feedback_decay:
        decays.append(optax.add_decayed_weights(feedback_decay, mask=_feedback_gains))
    return optax.chain(*decays)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _feedback_gains(params: Any) -> Any:
    def is_gain(path: Any, _: Any) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return names[0].startswith("trans_") and names[-1] == "gain"

    return jax.tree_util.tree_map_with_path(is_gain, params)
