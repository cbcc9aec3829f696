"""A gradient audit: how close each way of computing the gradient comes to the exact one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpisjax.analysis.gradients import TIGHT, Agreement, Problem, compare
from mpisjax.baselines import bptt
from mpisjax.neurons import LIF
from mpisjax.nn.mpis import MPIS
from mpisjax.residuals import worst
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import Adjoint, RateForward

Array = jax.Array


class Audit(NamedTuple):
    """What `gradient_audit` found.

    Attributes:
        reference: "dense exact", or "implicit, tight" where the network is too large for that.
        agreements: Method -> layer -> `Agreement`; the layer "all" is the whole gradient.
    """

    reference: str
    agreements: dict[str, dict[str, Agreement]]


def gradient_audit(
    net: MPIS,
    variables: dict[str, Any],
    images: Array,
    labels: Array,
    *,
    neuron: LIF,
    num_steps: int = 30,
    adjoint: Adjoint | None = None,
    surrogates: tuple[str, ...] = ("rectangular", "triangular", "arctan", "sigmoid"),
    unrolled_steps: int = 30,
    phantom_steps: int = 1,
) -> Audit:
    """Compares gradients of the cross-entropy on one batch, with running statistics and nothing dropped.

    The reference is the exact gradient at the fixed point of f. It is compared with the implicit gradient at
    the same point, with the implicit gradient at the rates of a simulation of `num_steps` (as training takes
    it), with the phantom gradient, with the derivative of `unrolled_steps` applications of f, and with
    backpropagation through the simulation for each surrogate.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        labels: int32 [batch].
        neuron: Neuron constants.
        num_steps: T of the simulations; temporal input has as many as frames.
        adjoint: The solver to audit; None: Neumann, 30 steps, tolerance 1e-3.
        surrogates: The surrogate gradients of BPTT to compare.
        unrolled_steps: Applications of f that are differentiated one by one.
        phantom_steps: Neumann steps of the phantom gradient.

    Returns:
        The reference and the agreements with it.

    Raises:
        UserError: The network has no fixed point that could be found.
    """
    problem = Problem(net, variables, images, labels, neuron)
    name, reference = problem.reference()
    adjoint = adjoint or Adjoint()
    spikes = SpikeForward(None if net.temporal else num_steps)

    def unrolled(params: Any) -> Array:
        rates = jax.lax.fori_loop(0, unrolled_steps, lambda _, r: problem.f(params, r), net.initial_rates(images))
        return problem.loss_of(params, rates)

    def through_time(surrogate: str) -> Callable[[Any], Array]:
        def loss(params: Any) -> Array:
            out = bptt.apply(
                net,
                problem.whole(params),
                images,
                neuron=neuron,
                num_steps=spikes.num_steps,
                bptt=bptt.BPTT(surrogate),
            )
            return problem.cross_entropy(out.logits)

        return loss

    phantom = Adjoint("phantom", phantom_steps)
    gradients = {
        f"implicit, {adjoint.solver}, at the fixed point": problem.implicit(TIGHT, adjoint)[0],
        f"implicit, {adjoint.solver}, after {num_steps} steps of spikes": problem.implicit(spikes, adjoint)[0],
        f"phantom, {phantom_steps} Neumann steps": problem.implicit(TIGHT, phantom)[0],
        f"rate map unrolled {unrolled_steps} times": jax.jit(jax.grad(unrolled))(problem.params),
    }
    for surrogate in surrogates:
        gradients[f"BPTT, {surrogate}, {num_steps} steps"] = jax.jit(jax.grad(through_time(surrogate)))(problem.params)
    return Audit(name, {method: compare(gradient, reference) for method, gradient in gradients.items()})


class Solve(NamedTuple):
    """What a pair of forward and backward solve gives.

    Attributes:
        evaluations: Evaluations of f, the most of any sample.
        residual: Relative residual of the rates, of the worst stream, mean over samples.
        agreement: The whole gradient against the exact one.
    """

    evaluations: int
    residual: float
    agreement: Agreement


def audit_solves(
    net: MPIS,
    variables: dict[str, Any],
    images: Array,
    labels: Array,
    *,
    neuron: LIF,
    solves: Mapping[str, tuple[RateForward | SpikeForward, Adjoint]],
) -> dict[str, Solve]:
    """How close the gradient of each pair of forward and backward solve comes to the exact one.

    It answers how many steps and which damping training needs; `gradient_audit` compares methods.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: Network input: [batch, h, w, c], temporal [time, batch, h, w, c].
        labels: int32 [batch].
        neuron: Neuron constants.
        solves: Pairs of forward and backward solve, by any name.

    Returns:
        What was found, by the names of `solves`.

    Raises:
        UserError: The network has no fixed point that could be found.
    """
    problem = Problem(net, variables, images, labels, neuron)
    _, reference = problem.reference()
    found = {}
    for name, (forward, adjoint) in solves.items():
        gradient, equilibrium = problem.implicit(forward, adjoint)
        residual = float(jnp.mean(worst(equilibrium.residual)))
        found[name] = Solve(int(equilibrium.num_steps), residual, compare(gradient, reference)["all"])
    return found
