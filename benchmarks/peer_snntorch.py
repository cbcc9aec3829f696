"""16C3-32C3-48C3s2-FC10 in snnTorch, as its tutorial on convolutional networks does it: a loop over time steps."""

from __future__ import annotations

import os

import numpy as np
import snntorch
import torch
from snntorch import functional, surrogate, utils
from torch import nn

from benchmarks.same_layers import CLASSES, LAYERS, Learner


def make(num_steps: int) -> Learner:
    """The network and its optimiser, for so many time steps."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    first, second, third = LAYERS

    def neuron(**options: bool) -> nn.Module:
        # A leak of 1 is integrate and fire; the reset subtracts the threshold.
        return snntorch.Leaky(beta=1.0, spike_grad=surrogate.atan(), init_hidden=True, **options)

    net = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        neuron(),
        nn.Conv2d(first, second, 3, padding=1),
        neuron(),
        nn.Conv2d(second, third, 3, stride=2, padding=1),
        neuron(),
        nn.Flatten(),
        nn.Linear(third * 14 * 14, CLASSES),
        neuron(output=True),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_of = functional.ce_rate_loss()

    def spikes_of(images: np.ndarray) -> torch.Tensor:
        utils.reset(net)
        x = torch.from_numpy(images)[:, None]
        return torch.stack([net(x)[0] for _ in range(num_steps)])

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        loss = loss_of(spikes_of(images), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def answer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return spikes_of(images).sum(0).argmax(1).numpy()

    return Learner(step, answer)
