"""A gradient audit: how close each way of computing the gradient comes to the exact one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from mpisjax.baselines import bptt
from mpisjax.equilibrium import Equilibrium
from mpisjax.errors import UserError
from mpisjax.firing import RateReading
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.residuals import worst
from mpisjax.simulate import SpikeForward, weighted_mean_frame
from mpisjax.solvers import Adjoint, RateForward

Array = jax.Array
LARGEST_DENSE = 4096
TIGHT = RateForward("anderson", max_steps=300, tol=1e-6)


class Agreement(NamedTuple):
    """A gradient against the reference.

    Attributes:
        cosine: The cosine of the angle between the two; NaN if one is zero.
        norm_ratio: Its norm divided by the reference's.
    """

    cosine: float
    norm_ratio: float


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


class Problem:
    """The cross-entropy of one batch, with running statistics and no dropout, and its gradients."""

    def __init__(self, net: MPIS, variables: dict[str, Any], images: Array, labels: Array, neuron: LIF) -> None:
        self._net, self._stats, self._images, self._labels = net, variables["batch_stats"], images, labels
        self._neuron, self._transition = neuron, model.transition_of(net)
        self.params = variables["params"]

    def whole(self, params: Any) -> dict[str, Any]:
        """All variables."""
        return {"params": params, "batch_stats": self._stats}

    def cross_entropy(self, logits: Any) -> Array:
        """Mean over the batch."""
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), self._labels[:, None], 1))

    def loss_of(self, params: Any, rates: Any) -> Array:
        """The loss as a function of equilibrium rates."""
        return self.cross_entropy(self._net.apply(self.whole(params), rates, False, method="classify"))

    def f(self, params: Any, rates: Any) -> Any:
        """The rate map."""
        x = self._net.apply(self.whole(params), self._images, False, method="encode")
        x = weighted_mean_frame(x, self._neuron.leak) if self._net.temporal else x
        return self._transition(self.whole(params), rates, x, RateReading(self._neuron))

    def implicit(self, forward: RateForward | SpikeForward, adjoint: Adjoint) -> tuple[Any, Equilibrium]:
        """The implicit gradient, and the equilibrium that it was taken at."""

        def loss(params: Any) -> tuple[Array, Equilibrium]:
            variables = self.whole(params)
            out = model.apply(self._net, variables, self._images, neuron=self._neuron, forward=forward, adjoint=adjoint)
            return self.cross_entropy(out.logits), out.equilibrium

        return jax.jit(jax.grad(loss, has_aux=True))(self.params)

    def reference(self) -> tuple[str, Any]:
        """The exact gradient at the fixed point of f, and its name.

        J as a matrix where it has at most `LARGEST_DENSE` rows; a tight iterative solve otherwise.

        Raises:
            UserError: The network has no fixed point that could be found.
        """
        gradient, found = self.implicit(TIGHT, Adjoint("anderson", max_steps=300, tol=1e-6))
        largest = max(float(jnp.max(r)) for r in jax.tree.leaves(found.residual))
        if not largest < 1e-2:
            raise UserError(
                f"the gradient audit found no fixed point of this network (residual {largest:.2g}): train it "
                "with train.jacobian_penalty above 0, or audit another checkpoint."
            )
        if sum(a[0].size for a in jax.tree.leaves(found.rates)) > LARGEST_DENSE:
            return "implicit, tight", gradient
        dense = jax.jit(lambda p, r: _dense_gradient(self.loss_of, self.f, p, r))
        return "dense exact", dense(self.params, found.rates)


def compare(gradient: Any, reference: Any) -> dict[str, Agreement]:
    """By layer, and "all" for the whole gradient."""

    def agree(a: Any, b: Any) -> Agreement:
        a, b = (np.concatenate([np.ravel(np.asarray(t, np.float64)) for t in jax.tree.leaves(x)]) for x in (a, b))
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        cosine = float(a @ b) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")
        return Agreement(cosine, norms[0] / norms[1] if norms[1] > 0 else float("nan"))

    return {"all": agree(gradient, reference), **{k: agree(gradient[k], reference[k]) for k in reference}}


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

    It answers how many steps and which damping training needs; `gradient_audit` compares methods, and says what the
    other arguments are.

    Args:
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
