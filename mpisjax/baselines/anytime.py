"""Low latency: one simulation, differentiated with surrogate gradients, read after several numbers of steps.

A network that is trained on rates answers well once its rates have settled. To answer after one to eight steps, train
it on what it shows then. The spikes of t steps are the first t steps of a longer simulation. So one simulation gives
the rates after every t, and the mean of the losses on them trains one network for all t.

The gradient is that of the simulation itself (`mpisjax.baselines.surrogates`). At t = 1 from half the threshold, the
rectangular surrogate gives the derivative of the clipped ReLU: a rounding, passed straight through (Bu et al., "Optimal
ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks", ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpisjax.baselines.surrogates import with_surrogate
from mpisjax.equilibrium import Equilibrium
from mpisjax.errors import UserError
from mpisjax.firing import RateReading
from mpisjax.hoisting import detach
from mpisjax.neurons import Neuron
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS, sample_masks
from mpisjax.residuals import relative_residual, worst
from mpisjax.simulate import SpikeForward, Step, accumulate, firing_rate, over_time, wide_zeros

Array = jax.Array


def check_times(times: Sequence[int]) -> None:
    """Refuses numbers of steps that do not rise from at least 1.

    Raises:
      UserError: in one sentence.
    """
    if list(times) != sorted(set(times)) or not times or times[0] < 1:
        raise UserError(f"bptt.times is {tuple(times)}: give numbers of time steps, rising, from at least 1.")


def rates_after(
    transition: Callable[..., Any],
    params: Any,
    x: Any,
    init: Any,
    *,
    neuron: Neuron,
    times: Sequence[int],
    surrogate: str = "triangular",
    remat: bool = False,
) -> list[Any]:
    """The firing rates of one simulation after each number of steps, differentiable in `params` and `x`.

    Args:
      transition: `transition(params, rates, x, fire) -> rates`, as for `equilibrium_forward`.
      params: pytree, passed through.
      x: pytree: a constant current.
      init: rates pytree: structure, shape and dtype; the first step's feedback.
      neuron: of the populations that bring none.
      times: numbers of steps, rising, the first at least 1.
      surrogate: a key of `mpisjax.baselines.surrogates.SURROGATES`.
      remat: compute each step again in the backward pass, to save memory.

    Returns:
      For each of `times` the leak-weighted firing rates, structure of `init`: those that `mpisjax.simulate` returns.

    Raises:
      UserError: `times` do not rise from at least 1, or the neurons have no surrogate derivative.
    """
    check_times(times)
    leak = neuron.leak

    def observe(seen: Any, step: Step) -> Any:
        total, weight = accumulate(seen[0], step.feedback, leak), leak * seen[1] + 1
        return (total, weight), firing_rate(total, weight)

    _, rates = over_time(
        transition,
        params,
        x,
        init,
        neuron=neuron,
        num_steps=times[-1],
        observer=observe,
        start=lambda shapes: (
            wide_zeros(init),
            jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(init))),
        ),
        of=with_surrogate(surrogate),
        remat=remat,
    )
    return [jax.tree.map(lambda r, like: r[t - 1].astype(like.dtype), rates, init) for t in times]  # noqa: B023


def apply(
    net: MPIS,
    variables: dict[str, Any],
    images: Array,
    *,
    neuron: Neuron,
    times: Sequence[int],
    surrogate: str = "triangular",
    remat: bool = False,
    rng: Array | None = None,
) -> model.Output:
    """Classifies a training batch by the spikes' own rates after each of several numbers of steps.

    Batch normalisation is as in evaluation, affine with the running statistics, which stay as they were: the network
    that is trained is the network that is used. Gains, scales and shifts learn.

    Args:
      net: the network, of static input.
      variables: `{"params": ..., "batch_stats": ...}`.
      images: [batch, h, w, c].
      neuron: neuron constants.
      times: numbers of steps, rising.
      surrogate: a key of `SURROGATES`.
      remat: compute each step again in the backward pass, to save memory.
      rng: key for dropout; None drops nothing.

    Returns:
      A `model.Output`, its logits [len(times), batch, num_classes]. Its equilibrium is that after the last step.

    Raises:
      UserError: the network's input is over time.
    """
    if net.temporal:
        raise UserError("bptt.times is for input that is constant in time: set it to () for frames.")
    variables = dict(variables)
    if net.dropout and rng is not None:
        variables["masks"] = sample_masks(net, rng, images.shape[0])
    x = net.apply(variables, images, False, method="encode")
    transition, init = model.transition_of(net), net.initial_rates(images)
    found = rates_after(transition, variables, x, init, neuron=neuron, times=times, surrogate=surrogate, remat=remat)
    logits = jnp.stack([model.classify(net, variables, rates) for rates in found])

    def residual_of(variables: Any, rates: Any, x: Any) -> Any:
        return relative_residual(transition(variables, rates, x, RateReading(neuron)), rates)

    residual = detach(residual_of, variables, found[-1], x)
    converged = worst(residual) <= SpikeForward().residual_tol
    equilibrium = Equilibrium(found[-1], residual, jnp.asarray(times[-1], jnp.int32), converged, {})
    return model.Output(logits, equilibrium, variables["batch_stats"])
