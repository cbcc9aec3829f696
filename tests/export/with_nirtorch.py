"""Runs an exported graph of IF nodes in nirtorch with snnTorch's neurons: what a user of these tools would write.

It imports nothing of mpisjax. Three things have to be said that the tools do not read from the file: neurons reset by
subtraction, start where the metadata say, and a Delay is nirtorch's own feedback, which is one step late.
"""

from __future__ import annotations

import graphlib
from typing import Any

import nir
import nirtorch
import numpy as np
import snntorch
import torch


class Neurons(torch.nn.Module):
    """snnTorch's Leaky without a leak. A delayed reset is ours: the potential is compared before the reset."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        (threshold,) = np.unique(node.v_threshold)
        self.start = float(node.metadata["initial_potential"]) * float(threshold)
        if (
            node.v_threshold.dtype.kind == "i"
        ):  # snnTorch fires above a threshold, we at it: half a unit between integers
            self.start = np.floor(self.start) + 0.5
        self.neurons = snntorch.Leaky(
            beta=1.0, threshold=float(threshold), reset_mechanism="subtract", reset_delay=True
        )
        self.count = 0

    def forward(self, x: Any, state: Any = None) -> Any:
        spikes, potential = self.neurons(x, torch.full_like(x, self.start) if state is None else state)
        self.count = self.count + spikes.reshape(len(spikes), -1).sum(1)
        return spikes.to(x.dtype), potential


class Scale(torch.nn.Module):
    """Multiplies."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(np.asarray(node.scale), dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        return x * self.scale


class Nothing(torch.nn.Module):
    """Zeros of a Delay's shape: with a second source, nirtorch takes the feedback at this place."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.shape = np.asarray(node.threshold).shape

    def forward(self, x: Any) -> Any:
        return torch.zeros(len(x), *self.shape, dtype=x.dtype)


NODES = {
    nir.IF: Neurons,
    nir.Scale: Scale,
    nir.Threshold: Nothing,
    nir.Delay: lambda node: torch.nn.Identity(),
}


def run(
    graph: Any, x: np.ndarray, num_steps: int, dtype: Any = torch.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores [batch, classes] and spikes by population, [batch], from the graph's input."""
    for node in graph.nodes.values():
        if isinstance(node, nir.Conv2d):  # nirtorch makes them parameters, which torch wants in floating point
            node.weight, node.bias = np.float64(node.weight), np.float64(node.bias)
    delays = {name for name, node in graph.nodes.items() if isinstance(node, nir.Delay)}
    for delay, target in [e for e in graph.edges if e[0] in delays]:
        graph.nodes[f"{target}_nothing"] = nir.Threshold(threshold=graph.nodes[delay].delay)
        graph.edges += [("input", f"{target}_nothing"), (f"{target}_nothing", target)]
    # A file holds nodes by the alphabet. In the order of a step, nirtorch finds the feedback at the Delays alone.
    before = {name: [s for s, to in graph.edges if to == name and s not in delays] for name in graph.nodes}
    graph.nodes = {name: graph.nodes[name] for name in graphlib.TopologicalSorter(before).static_order()}
    module, state, total = nirtorch.nir_to_torch(graph, NODES, dtype=dtype), None, 0
    with torch.no_grad():
        for _ in range(num_steps):
            out, state = module(torch.tensor(x, dtype=dtype), state)
            total = total + out.reshape(len(x), -1)
    spikes = {n: m.count.numpy() for n, m in module.named_modules() if isinstance(m, Neurons)}
    return total.numpy() / num_steps, {n.removesuffix("_spikes"): s for n, s in spikes.items()}
