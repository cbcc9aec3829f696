"""16C3-32C3-48C3s2-FC10 in SpikingJelly's multi-step mode, as its example for Fashion-MNIST does it."""

from __future__ import annotations

import os

import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.functional import mse_loss, one_hot

from benchmarks.same_layers import CLASSES, LAYERS, Learner


def make(num_steps: int) -> Learner:
    """The network and its optimiser, for so many time steps."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    first, second, third = LAYERS

    def node() -> nn.Module:
        # v_reset=None: the reset subtracts the threshold, as everywhere here.
        return neuron.IFNode(v_reset=None, surrogate_function=surrogate.ATan())

    net = nn.Sequential(
        layer.Conv2d(1, first, 3, padding=1, bias=False),
        layer.BatchNorm2d(first),
        node(),
        layer.Conv2d(first, second, 3, padding=1, bias=False),
        layer.BatchNorm2d(second),
        node(),
        layer.Conv2d(second, third, 3, stride=2, padding=1, bias=False),
        layer.BatchNorm2d(third),
        node(),
        layer.Flatten(),
        layer.Linear(third * 14 * 14, CLASSES, bias=False),
        node(),
    )
    functional.set_step_mode(net, "m")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def rates_of(images: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(images)[:, None]
        return net(x.unsqueeze(0).expand(num_steps, -1, -1, -1, -1)).mean(0)

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        loss = mse_loss(rates_of(images), one_hot(torch.from_numpy(labels), CLASSES).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        return loss.item()

    def answer(images: np.ndarray) -> np.ndarray:
        net.eval()
        with torch.no_grad():
            found = rates_of(images).argmax(1).numpy()
        functional.reset_net(net)
        net.train()
        return found

    return Learner(step, answer)
