"""The training state, the optimiser and the learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

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


def make_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then cosine to zero or steps down at the milestones."""
    t = config.train
    total = t.epochs * steps_per_epoch
    warmup = min(round(t.warmup_epochs * steps_per_epoch), max(total - 1, 0))
    if t.schedule == "cosine":
        after = optax.cosine_decay_schedule(t.learning_rate, max(total - warmup, 1))
    else:
        falls = {max(round(m * total) - warmup, 0): t.decay for m in t.milestones}
        after = optax.piecewise_constant_schedule(t.learning_rate, falls)
    if not warmup:
        return after
    rise = optax.linear_schedule(t.learning_rate / warmup, t.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with Nesterov momentum; weight decay on kernels alone, not on gains, scales and shifts.

    `train.feedback_decay` adds one on the gains of the feedback convolutions Trans: they have no batch
    normalisation after them, so their gains set how strongly the streams feed back, and kernels do not.
    """
    t = config.train

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def feedback(params: Any) -> Any:
        def is_gain(path: Any, _: Any) -> bool:
            return str(path[0].key).startswith("trans_") and path[-1].key == "gain"

        return jax.tree_util.tree_map_with_path(is_gain, params)

    decays = [optax.add_decayed_weights(t.weight_decay, mask=kernels)]
    if t.feedback_decay:
        decays.append(optax.add_decayed_weights(t.feedback_decay, mask=feedback))
    return optax.chain(
        optax.clip_by_global_norm(t.gradient_clip) if t.gradient_clip else optax.identity(),
        optax.chain(*decays),
        optax.sgd(
            make_schedule(config, steps_per_epoch), momentum=t.momentum or None, nesterov=bool(t.momentum)
        ),
    )


def init_state(
    config: ml_collections.ConfigDict, variables: dict[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averaged = {"params": params, "batch_stats": batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, averaged) if config.train.ema else (),
        skipped=jnp.zeros((), jnp.int32),
        rng=jax.random.key(config.seed + 1),
    )


def evaluated_variables(state: TrainState) -> dict[str, Any]:
    """What evaluation takes of a state: the averages where they are kept, parameters and running statistics alike.

    Running statistics describe the activity under the parameters they were gathered with; under averaged ones they
    have to be averaged too.
    """
    return {"params": state.params, "batch_stats": state.batch_stats} if state.ema == () else state.ema
