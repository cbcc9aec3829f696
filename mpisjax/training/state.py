"""The training state."""

from __future__ import annotations

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
