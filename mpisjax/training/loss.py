"""What training minimises: the cross-entropy of the network's answer, and what is added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpisjax.baselines import bptt as through_time
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import DataSet, class_counts
from mpisjax.errors import UserError
from mpisjax.firing import RateReading
from mpisjax.jacobian import jacobian_penalty
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.simulate import SpikeForward, weighted_mean_frame
from mpisjax.solvers import Adjoint, RateForward

Array = jax.Array
LossFn = Callable[..., tuple[Array, model.Output]]


def make_loss(
    network: Any,
    *,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    adjoint: Adjoint | None,
    bptt: BPTT | None,
    returns: str,
    class_weights: Sequence[float] = (),
    jacobian_weight: float = 0.0,
    rate_weight: float = 0.0,
) -> LossFn:
    """`loss(params, probe, batch_stats, x, targets, rng) -> (loss, Output)`: cross-entropy, and what is added to it.

    The network answers by its equilibrium, or through time where `bptt` says how.
    """
    transition = model.transition_of(network)

    def loss_fn(params: Any, probe: Any, batch_stats: Any, x: Array, targets: Array, rng: Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        how: dict[str, Any] = {"neuron": neuron, "train": True, "rng": rng}
        if bptt is None:
            how |= {"forward": forward, "adjoint": adjoint, "returns": returns, "probe": probe}
            out = model.apply(network, variables, x, **how)
        else:  # nothing is solved backward
            assert isinstance(forward, SpikeForward)
            out = through_time.apply(network, variables, x, num_steps=forward.num_steps, bptt=bptt, **how)
        losses = optax.softmax_cross_entropy(out.logits, targets)
        loss = (losses * (targets @ jnp.asarray(class_weights)) if class_weights else losses).mean()
        if not (jacobian_weight or rate_weight):
            return loss, out
        # Of the map that is solved in evaluation: running statistics, nothing dropped.
        encoded = network.apply(variables, x, False, method="encode")
        encoded = weighted_mean_frame(encoded, neuron.leak) if network.temporal else encoded
        if jacobian_weight:
            loss += jacobian_weight * jacobian_penalty(
                lambda r: transition(variables, r, encoded, RateReading(neuron)),
                out.equilibrium.rates,
                jax.random.fold_in(rng, 1),
            )
        if rate_weight:
            reading = RateReading(neuron)
            transition(variables, out.equilibrium.rates, encoded, reading)
            loss += rate_weight * mean_rate(reading.activity)
        return loss, out

    return loss_fn


def mean_rate(activity: dict[str, Array]) -> Array:
    """The mean firing rate of the populations, each weighing the same; of spikes of both signs their number counts."""
    return jnp.mean(jnp.stack([jnp.mean(jnp.abs(rates)) for rates in activity.values()]))


def class_weights_of(weights: Sequence[float] | str, dataset: DataSet) -> tuple[float, ...]:
    """Factors of the classes in the loss.

    Args:
        weights: One for each class; "balanced": the inverse of the class's share in the train split, with a mean of 1
            over the examples; empty: none.
        dataset: The data.

    Raises:
        UserError: They are not one number above 0 for each class.
    """
    if not weights:
        return ()
    classes = dataset.num_classes
    if weights == "balanced":
        counts = class_counts(dataset.train.labels, classes)
        return tuple(len(dataset.train.labels) / (classes * max(count, 1)) for count in counts)
    try:
        found = tuple(float(w) for w in (weights.split(",") if isinstance(weights, str) else weights))
    except ValueError:
        found = ()
    if len(found) != classes or not all(0 < w < float("inf") for w in found):
        raise UserError(
            f"train.class_weights is {weights!r}: give {classes} numbers above 0, one for each class, such as "
            f"{','.join(['1'] * (classes - 1) + ['2'])}, or balanced"
        )
    return found
