"""A gradient audit: how good is each way to the gradient, layer by layer, on a given network and batch?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from mpisjax.baselines import bptt
from mpisjax.errors import UserError
from mpisjax.neurons import LIF, RateReading
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.simulate import SpikeForward, weighted_mean_frame
from mpisjax.solvers import Adjoint, RateForward

Array = jax.Array
LARGEST_DENSE = 4096


class Agreement(NamedTuple):
    """A gradient against the reference.

    Attributes:
      cosine: of the angle between them; NaN where one is zero.
      norm_ratio: its norm over the reference's.
    """

    cosine: float
    norm_ratio: float


class Audit(NamedTuple):
    """What `gradient_audit` found.

    Attributes:
      reference: "dense exact", or "implicit, tight" where the network is too large for that.
      agreements: method -> layer -> `Agreement`; the layer "all" is the whole gradient.
    """

    reference: str
    agreements: dict[str, dict[str, Agreement]]


def _dense_gradient(loss_of: Any, f: Any, params: Any, rates: Any) -> Any:
    """The exact implicit gradient: (I - J^T) v = g solved sample by sample with J as a matrix."""
    g = jax.grad(lambda r: loss_of(params, r))(rates)
    flat, unravel_one = ravel_pytree(jax.tree.map(lambda a: a[0], rates))
    unravel, ravel = jax.vmap(unravel_one), jax.vmap(lambda t: ravel_pytree(t)[0])
    batch = jax.tree.leaves(rates)[0].shape[0]
    _, vjp = jax.vjp(lambda r: f(params, r), rates)

    def row(basis: Array) -> Array:
        return ravel(vjp(unravel(jnp.broadcast_to(basis, (batch, flat.size))))[0])

    # jacobian[k, b, :] = e_k^T J of sample b: samples do not mix.
    jacobian = jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype))
    system = jnp.eye(flat.size) - jnp.transpose(jacobian, (1, 2, 0))
    v = unravel(jnp.linalg.solve(system, ravel(g)[..., None])[..., 0])
    through_map = jax.vjp(lambda p: f(p, rates), params)[1](v)[0]
    direct = jax.grad(lambda p: loss_of(p, rates))(params)
    return jax.tree.map(jnp.add, through_map, direct)


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

    The reference is the exact gradient at the fixed point of f. Against it stand: the implicit gradient at the
    same point; at what a simulation of `num_steps` found (as training takes it); the phantom gradient there; the
    derivative of `unrolled_steps` applications of f, unrolled; and backpropagation through the simulation with
    each surrogate.

    Args:
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      images: network input: [batch, h, w, c], temporal [time, batch, h, w, c].
      labels: int [batch].
      neuron: neuron constants.
      num_steps: T of the simulations; temporal input has as many as frames.
      adjoint: the solver to audit; Neumann, 30 steps, tolerance 1e-3 by default.
      surrogates: for BPTT.
      unrolled_steps: applications of f that are differentiated one by one.
      phantom_steps: Neumann steps of the phantom gradient.

    Returns:
      An `Audit`.

    Raises:
      UserError: no fixed point was found, so that there is nothing to compare with.
    """
    params, stats = variables["params"], variables["batch_stats"]
    transition = model.transition_of(net)

    def whole(params: Any) -> dict[str, Any]:
        return {"params": params, "batch_stats": stats}

    def cross_entropy(logits: Any) -> Array:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    def loss_of(params: Any, rates: Any) -> Array:
        return cross_entropy(net.apply(whole(params), rates, False, method="classify"))

    def f(params: Any, rates: Any) -> Any:
        x = net.apply(whole(params), images, False, method="encode")
        x = weighted_mean_frame(x, neuron.leak) if net.temporal else x
        return transition(whole(params), rates, x, RateReading(neuron))

    def implicit(forward: Any, adjoint: Adjoint) -> Callable[[Any], Any]:
        def loss(params: Any) -> tuple[Array, Any]:
            out = model.apply(net, whole(params), images, neuron=neuron, forward=forward, adjoint=adjoint)
            return cross_entropy(out.logits), out.equilibrium

        return jax.jit(jax.grad(loss, has_aux=True))

    tight = RateForward("anderson", max_steps=300, tol=1e-6)
    reference, found = implicit(tight, Adjoint("anderson", max_steps=300, tol=1e-6))(params)
    worst = max(float(jnp.max(r)) for r in jax.tree.leaves(found.residual))
    if not worst < 1e-2:
        raise UserError(
            f"the gradient audit found no fixed point of this network (residual {worst:.2g}): train it with "
            "train.jacobian_penalty above 0, or audit another checkpoint."
        )
    name, size = "implicit, tight", sum(a[0].size for a in jax.tree.leaves(found.rates))
    if size <= LARGEST_DENSE:
        name = "dense exact"
        reference = jax.jit(lambda p, r: _dense_gradient(loss_of, f, p, r))(params, found.rates)

    adjoint = adjoint or Adjoint()
    spikes = SpikeForward(None if net.temporal else num_steps)

    def unrolled(params: Any) -> Array:
        rates = jax.lax.fori_loop(0, unrolled_steps, lambda _, r: f(params, r), net.initial_rates(images))
        return loss_of(params, rates)

    def through_time(surrogate: str) -> Callable[[Any], Array]:
        def loss(params: Any) -> Array:
            settings = bptt.BPTT(surrogate)
            out = bptt.apply(
                net, whole(params), images, neuron=neuron, num_steps=spikes.num_steps, bptt=settings
            )
            return cross_entropy(out.logits)

        return loss

    gradients = {
        f"implicit, {adjoint.solver}, at the fixed point": implicit(tight, adjoint)(params)[0],
        f"implicit, {adjoint.solver}, after {num_steps} steps of spikes": implicit(spikes, adjoint)(params)[
            0
        ],
        f"phantom, {phantom_steps} Neumann steps": implicit(tight, Adjoint("phantom", phantom_steps))(params)[
            0
        ],
        f"rate map unrolled {unrolled_steps} times": jax.jit(jax.grad(unrolled))(params),
    }
    for surrogate in surrogates:
        gradients[f"BPTT, {surrogate}, {num_steps} steps"] = jax.jit(jax.grad(through_time(surrogate)))(
            params
        )
    return Audit(name, {method: _compare(gradient, reference) for method, gradient in gradients.items()})


def _compare(gradient: Any, reference: Any) -> dict[str, Agreement]:
    def agree(a: Any, b: Any) -> Agreement:
        a, b = (
            np.concatenate([np.ravel(np.asarray(t, np.float64)) for t in jax.tree.leaves(x)]) for x in (a, b)
        )
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        cosine = float(a @ b) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")
        return Agreement(cosine, norms[0] / norms[1] if norms[1] > 0 else float("nan"))

    return {"all": agree(gradient, reference), **{k: agree(gradient[k], reference[k]) for k in reference}}
