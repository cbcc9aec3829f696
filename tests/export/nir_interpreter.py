"""A simulator of NIR graphs in NumPy: forward Euler with step 1 on the equations of NIR's own documentation.

It imports nothing of mpisjax. Nodes are computed in the order in which they depend on one another within a step; a
`Delay` of one step gives what it was given a step ago, and so opens every loop. Several edges into a node are summed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import nir
import numpy as np


def convolve(x: np.ndarray, node: Any) -> np.ndarray:
    """[batch, C, H, W], cross-correlation as in nir.Conv2d."""
    (py, px), (sy, sx) = np.broadcast_to(node.padding, 2), np.broadcast_to(node.stride, 2)
    assert np.all(np.asarray(node.dilation) == 1) and node.groups == 1
    padded = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))
    ky, kx = node.weight.shape[2:]
    height, width = (padded.shape[2] - ky) // sy + 1, (padded.shape[3] - kx) // sx + 1
    out = np.zeros((len(x), len(node.weight), height, width), np.result_type(x, node.weight))
    for i in range(ky):
        for j in range(kx):
            seen = padded[:, :, i : i + sy * height : sy, j : j + sx * width : sx]
            out += np.einsum("bchw,oc->bohw", seen, node.weight[:, :, i, j])
    return out + node.bias[:, None, None]


class Simulator:
    """Runs a graph step by step.

    Args:
        graph: What `nir.read` gave.
        batch: Samples side by side.
        subtract: Whether IF and LIF nodes reset by subtraction of what their metadata say; NIR's equations reset them
            to `v_reset`.
    """

    def __init__(self, graph: nir.NIRGraph, batch: int, subtract: bool = False) -> None:
        self.graph, self.subtract = graph, subtract
        self.sources = defaultdict(list)
        for source, target in graph.edges:
            self.sources[target].append(source)
        self.state = {
            name: np.zeros((batch, *node.output_type["output"]), node_dtype(node))
            for name, node in graph.nodes.items()
            if isinstance(node, nir.I | nir.LI | nir.IF | nir.LIF | nir.Delay)
        }
        self.order = self._order()

    def _order(self) -> list[str]:
        done: list[str] = []
        waiting = [n for n, node in self.graph.nodes.items() if not isinstance(node, nir.Delay)]
        known = {n for n, node in self.graph.nodes.items() if isinstance(node, nir.Delay)}
        while waiting:
            ready = [n for n in waiting if all(s in known for s in self.sources[n])]
            assert ready, f"a loop without a delay among {waiting}"
            done += ready
            known |= set(ready)
            waiting = [n for n in waiting if n not in known]
        return done

    def step(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """One time step; the output of every node, by name."""
        values = {n: self.state[n] for n, node in self.graph.nodes.items() if isinstance(node, nir.Delay)}
        for name in self.order:
            node = self.graph.nodes[name]
            given = x if isinstance(node, nir.Input) else sum(values[s] for s in self.sources[name])
            values[name] = self._compute(name, node, given)
        for name, node in self.graph.nodes.items():
            if isinstance(node, nir.Delay):
                assert np.all(node.delay == 1)
                self.state[name] = sum(values[s] for s in self.sources[name])
        return values

    def _compute(self, name: str, node: Any, given: np.ndarray) -> np.ndarray:
        if isinstance(node, nir.Input | nir.Output):
            return given
        if isinstance(node, nir.Conv2d):
            return convolve(given, node)
        if isinstance(node, nir.Scale):
            return given * node.scale
        if isinstance(node, nir.Threshold):
            return (given > node.threshold).astype(given.dtype)
        v = self.state[name]
        if isinstance(node, nir.I):
            v = v + node.r * given
            self.state[name] = v
            return v
        if isinstance(node, nir.LI):
            v = v + (node.v_leak - v + node.r * given) / node.tau
            self.state[name] = v
            return v
        if isinstance(node, nir.IF):
            v = v + node.r * given
        else:
            assert isinstance(node, nir.LIF), node
            v = v + (node.v_leak - v + node.r * given) / node.tau
        fired = v > node.v_threshold
        after = v - node.metadata["subtracted"] if self.subtract else node.v_reset
        self.state[name] = np.where(fired, after, v)
        return fired.astype(v.dtype)


def node_dtype(node: Any) -> np.dtype:
    """Of a node's parameters."""
    for name in ("r", "v_threshold", "threshold", "delay"):
        if hasattr(node, name):
            return np.asarray(getattr(node, name)).dtype
    raise AssertionError(node)
