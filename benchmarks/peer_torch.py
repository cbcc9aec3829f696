"""The F64C5 network in PyTorch, trained implicitly as PyTorch's equilibrium SNNs are, to compare with ours.

The recipe is that of IDE-FSNN (Xiao et al., "Training Feedback Spiking Neural Networks by Implicit
Differentiation on the Equilibrium State", NeurIPS 2021): simulate T steps with no gradient, take one
differentiable step, and solve the backward fixed point through autograd products with J^T, by Broyden's
method limited to 30 iterations and stopped at an absolute 2e-10 sqrt(n), or by a fixed-point iteration. The
network, its weight norm, batch norm and neuron are ours to the letter, so that both sides can be checked
against each other.

What does not change between steps is computed once here as well, updates are made in place, tensors are
channels-last (faster than the default for these convolutions) and the first step, whose feedback is silent,
skips its convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_EPSILON, _MOMENTUM = 1e-5, 0.9


class Backward(NamedTuple):
    """How the backward fixed point v = g + J^T v is solved.

    Attributes:
        solver: "broyden" or "neumann".
        max_steps: Most products with J^T.
        tol: Stop at a residual of `tol * ||g||` over the batch; 0 stops at the absolute 2e-10 sqrt(n)
            instead.
    """

    solver: str = "broyden"
    max_steps: int = 30
    tol: float = 0.0


class Step(NamedTuple):
    """What a training step reports."""

    loss: float
    num_steps: int
    rates: Tensor


def _kernel(hwio: np.ndarray, transposed: bool) -> np.ndarray:
    """[k, k, in, out], or [k, k, out, in] of a transposed convolution, -> [out, in, k, k] of a plain one."""
    if transposed:  # a transposed convolution of stride 1 is a convolution with the kernel turned round
        return np.ascontiguousarray(hwio[::-1, ::-1].transpose(2, 3, 0, 1))
    return np.ascontiguousarray(hwio.transpose(3, 2, 0, 1))


class F64C5(nn.Module):
    """One stream of one convolution, with feedback: `r = clip(inject(x) + trans(r), 0, 1)`, threshold 1.

    Args:
        variables: `{"params": ..., "batch_stats": ...}` of the MPIS network, as NumPy arrays.
        leak: Of the neurons.
        initial_potential: Of the neurons, before the first step.
        dtype: Of everything.
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self, variables: dict[str, Any], leak: float, initial_potential: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        params, stats = variables["params"], variables["batch_stats"]["inject"]

        def parameter(array: np.ndarray) -> nn.Parameter:
            return nn.Parameter(torch.tensor(np.asarray(array), dtype=dtype))

        inject, trans, dense = params["inject"], params["trans_0"], params["classifier"]
        self.inject_kernel = parameter(_kernel(np.asarray(inject["kernel"]), False))
        self.inject_gain, self.inject_scale = parameter(inject["gain"]), parameter(inject["scale"])
        self.inject_bias = parameter(inject["bias"])
        self.trans_kernel = parameter(_kernel(np.asarray(trans["kernel"]), True))
        self.trans_gain, self.trans_bias = parameter(trans["gain"]), parameter(trans["bias"])
        self.dense_kernel = parameter(np.asarray(dense["kernel"]).T)
        self.dense_bias = parameter(dense["bias"])
        self.register_buffer("mean", torch.tensor(np.asarray(stats["mean"]), dtype=dtype))
        self.register_buffer("var", torch.tensor(np.asarray(stats["var"]), dtype=dtype))
        self.leak, self.initial_potential = leak, initial_potential

    @staticmethod
    def _normalised(kernel: Tensor, gain: Tensor) -> Tensor:
        norm = kernel.square().sum((1, 2, 3), keepdim=True).sqrt()
        return kernel * (gain[:, None, None, None] / norm)

    def injected(self, x: Tensor, batch_statistics: bool) -> Tensor:
        """The constant current of an input [batch, 1, h, w], with the feedback's bias added."""
        y = functional.conv2d(x, self._normalised(self.inject_kernel, self.inject_gain), padding=2)
        y = functional.batch_norm(
            y,
            self.mean,
            self.var,
            self.inject_scale,
            self.inject_bias,
            batch_statistics,
            1 - _MOMENTUM,
            _EPSILON,
        )
        return y + self.trans_bias[:, None, None]

    def feedback(self) -> Tensor:
        """The kernel of the feedback, normalised."""
        return self._normalised(self.trans_kernel, self.trans_gain).contiguous(memory_format=torch.channels_last)

    def simulate(self, x: Tensor, num_steps: int) -> Tensor:
        """Leak-weighted firing rates of LIF neurons after `num_steps`; no gradient."""
        with torch.no_grad():
            current, kernel = self.injected(x, False), self.feedback()
            u = current + self.initial_potential
            spikes = torch.empty_like(u)
            total, weight = torch.zeros_like(u), 0.0
            for t in range(num_steps):
                if t:
                    u += functional.conv2d(spikes, kernel, padding=2)
                    u += current
                torch.ge(u, 1.0, out=spikes)
                u -= spikes
                u *= self.leak
                total *= self.leak
                total += spikes
                weight = self.leak * weight + 1
            return total / weight

    def solve(self, x: Tensor, num_steps: int) -> Tensor:
        """Rates by fixed-point iteration on the equivalent map; no gradient."""
        with torch.no_grad():
            current, kernel = self.injected(x, False), self.feedback()
            rates = torch.zeros_like(current)
            for _ in range(num_steps):
                rates = (functional.conv2d(rates, kernel, padding=2) + current).clamp_(0, 1)
            return rates

    def logits(self, rates: Tensor) -> Tensor:
        """The classifier on [batch, 64, h, w]."""
        features = rates.permute(0, 2, 3, 1).flatten(1)
        return functional.linear(features, self.dense_kernel, self.dense_bias)

    def backpropagate(self, x: Tensor, labels: Tensor, rates: Tensor, backward: Backward) -> Step:
        """From the forward's rates to gradients in every parameter's `.grad`."""
        with torch.no_grad():
            current = self.injected(x, False)
        kernel = self.feedback()
        stepped = (functional.conv2d(rates, kernel, padding=2) + self.injected(x, True)).clamp(0, 1)
        found = stepped.detach().requires_grad_()
        loss = functional.cross_entropy(self.logits(found), labels)
        loss.backward()
        g = found.grad
        assert g is not None
        # The map of the solve, with running statistics, linearised once at the rates that were found.
        z = found.detach().requires_grad_()
        y = (functional.conv2d(z, kernel.detach(), padding=2) + current).clamp(0, 1)

        def product(v: Tensor) -> Tensor:
            return torch.autograd.grad(y, z, v, retain_graph=True)[0]

        limit = backward.tol * float(g.norm()) if backward.tol else 2e-10 * g.numel() ** 0.5
        solver = broyden if backward.solver == "broyden" else neumann
        v, num_steps = solver(product, g, backward.max_steps, limit)
        stepped.backward(v)
        return Step(loss.item(), num_steps, stepped.detach())


def neumann(product: Any, g: Tensor, max_steps: int, limit: float) -> tuple[Tensor, int]:
    """v <- g + J^T v until an update is at most `limit` in norm; returns v and the products taken."""
    v, taken, moved = g, 0, float("inf")
    while moved > limit and taken < max_steps:
        new = g + product(v)
        moved, v = float((new - v).norm()), new
        taken += 1
    return v, taken


def broyden(product: Any, g: Tensor, max_steps: int, limit: float) -> tuple[Tensor, int]:
    """Finds the root of h(v) = g + J^T v - v by Broyden's good method, without a line search.

    Each sample has its own approximation B = -I + sum_k u_k w_k^T of the inverse Jacobian of h, kept as the
    vectors u and w of all iterations so far and updated by Sherman and Morrison's formula.

    Returns:
        The iterate with the smallest residual, and the products taken.
    """
    batch = g.shape[0]

    def h(v: Tensor) -> Tensor:
        return product(v).add_(g).sub_(v)

    def flat(v: Tensor) -> Tensor:
        # Channels-last memory, seen as one row a sample: no copy.
        return v.permute(0, 2, 3, 1).reshape(batch, -1)

    def shaped(rows: Tensor) -> Tensor:
        b, c, height, width = g.shape
        return rows.view(b, height, width, c).permute(0, 3, 1, 2)

    n = flat(g).shape[1]
    us, ws = g.new_empty(max_steps, batch, n), g.new_empty(max_steps, batch, n)
    v = torch.zeros_like(g)
    value = flat(g.clone())  # h(0)
    best, smallest, step = v, float(value.norm()), value.clone()
    for k in range(max_steps):
        v = v + shaped(step)
        new = flat(h(v))
        change, value = new - value, new
        size = float(value.norm())
        if size < smallest:
            best, smallest = v, size
        if size <= limit or k + 1 == max_steps:
            break
        # w = B^T step, and B change.
        w, moved = -step, -change
        if k:
            w += torch.einsum("kb,kbn->bn", torch.einsum("bn,kbn->kb", step, us[:k]), ws[:k])
            moved += torch.einsum("kb,kbn->bn", torch.einsum("bn,kbn->kb", change, ws[:k]), us[:k])
        scale = (w * change).sum(1, keepdim=True)
        ws[k] = w
        us[k] = torch.where(scale == 0, 0.0, (step - moved) / scale)
        # The next step is -B h(v).
        step = value.clone()
        step -= torch.einsum("kb,kbn->bn", torch.einsum("bn,kbn->kb", value, ws[: k + 1]), us[: k + 1])
    return best, k + 1


def optimizer(net: F64C5, learning_rate: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Nesterov SGD; weight decay on kernels alone."""
    kernels = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=True)
