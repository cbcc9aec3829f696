"""An independent simulator of NIR graphs in NumPy, from image to class: forward Euler with step 1 on NIR's equations.

It imports nothing of mpisjax, so that it can check what mpisjax writes; it needs `numpy` and `nir` alone, and may be
copied. Nodes are computed in the order in which they depend on one another within a step; a `Delay` of one step gives
what it was given a step ago, and so opens every loop. Several edges into a node are summed. A graph of integers is
computed in integers.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
BLOCK = 16  # channels of a convolution that are computed together


class Run(NamedTuple):
    """What a run found.

    Attributes:
        scores: [batch, classes], the mean over the steps; weighted by the leak where there is one.
        spikes: By population: what it fired, summed over steps and neurons, [batch].
    """

    scores: Array
    spikes: dict[str, Array]


def run(
    graph: Any,
    images: Array,
    num_steps: int,
    watch: Callable[[int, dict[str, Array]], None] = lambda step, values: None,
) -> Run:
    """Classifies images with the graph and its metadata alone.

    Args:
        graph: What `nir.read` gave.
        images: uint8 [batch, height, width, channels]; frames: [batch, time, height, width, channels].
        num_steps: Time steps; frames have their own number.
        watch: `watch(step, values)` sees every node's output in every step, by name.
    """
    given = encode(graph, images)
    temporal = bool(graph.metadata["input"]["temporal"])
    simulator = Simulator(graph, len(images), dtype=given.dtype)
    leak, outputs = float(graph.metadata["leak"]), [n for n in graph.nodes if n.startswith("output")]
    total: dict[str, Any] = dict.fromkeys(outputs, 0)
    spikes: dict[str, Any] = dict.fromkeys((n for n in graph.nodes if n.endswith("_spikes")), 0)
    weight = 0.0
    for step in range(given.shape[1] if temporal else num_steps):
        values = simulator.step(given[:, step] if temporal else given)
        watch(step, values)
        total = {n: (t if leak == 1 else leak * t) + values[n] for n, t in total.items()}
        spikes = {n: s + values[n].reshape(len(images), -1).sum(1) for n, s in spikes.items()}
        weight = leak * weight + 1
    means = {n: t / weight for n, t in total.items()}
    return Run(classify(graph, means), {n.removesuffix("_spikes"): s for n, s in spikes.items()})


def encode(graph: Any, images: Array) -> Array:
    """The graph's input, channels first, from pixels.

    `metadata["input"]` says how: `(pixels / 255 - mean) / std`, or `pixels - offset` in integers; where its kind is
    "current", the stem's layers follow, and `scale` and rounding where the currents are integers.
    """
    about = graph.metadata["input"]
    if "offset" in about:
        x = images.astype(np.int64) - np.asarray(about["offset"]).astype(np.int64)
    else:
        dtype = np.asarray(about["mean"]).dtype
        x = (images.astype(dtype) / dtype.type(255) - about["mean"]) / about["std"]
    layers = [graph.metadata["stem"][k] for k in sorted(graph.metadata.get("stem", {}))]
    for layer in layers[:-1]:
        x = np.clip(same(x, layer, int(layer["stride"])), 0, 1)
    if layers:
        x = same(x, layers[-1], int(layers[-1]["stride"]))
    if "scale" in about:
        x = np.rint(x / about["scale"]).astype(np.int64)
    return np.moveaxis(x, -1, -3)


def classify(graph: Any, means: dict[str, Array]) -> Array:
    """Scores [batch, classes] from the outputs' means over the steps."""
    if "output" in means:
        return means["output"].reshape(len(means["output"]), -1)
    layers, names = graph.metadata["head"], sorted(means)
    total: Any = 0
    for name in names:
        stream = name.removeprefix("output_")
        about = graph.metadata["populations"][max(p for p in graph.metadata["populations"] if p.startswith(stream))]
        x = image_of(means[name], about)
        for key in sorted(k for k in layers if k.startswith(stream)):
            x = same(x, layers[key], 1 if name == names[-1] else 2)
        total = total + x
    features = np.clip(total, 0, 1).reshape(len(total), -1)
    return features @ layers["classifier"]["kernel"] + layers["classifier"]["bias"]


def image_of(values: Array, population: Any) -> Array:
    """A population's values [batch, height, width, channels] from the grid [batch, phases^2 * channels, h, w]."""
    phases, channels = int(population["phases"]), int(population["channels"])
    batch, _, h, w = values.shape
    split = values.reshape(batch, phases, phases, channels, h, w).transpose(0, 4, 1, 5, 2, 3)
    whole = split.reshape(batch, h * phases, w * phases, channels)
    return whole[:, : int(population["height"]), : int(population["width"])]


def same(x: Array, layer: Any, stride: int) -> Array:
    """A convolution with "same" padding of an image [..., height, width, channels], with the kernel [k, k, in, out]."""
    kernel = np.asarray(layer["kernel"])
    k, (h, w) = kernel.shape[0], x.shape[-3:-1]
    pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in (h, w)]
    around = [(0, 0)] * (x.ndim - 3) + [(p // 2, p - p // 2) for p in pads] + [(0, 0)]
    padded, out = np.pad(x, around), [-(-n // stride) for n in (h, w)]
    total: Any = 0
    for i in range(k):
        for j in range(k):
            seen = padded[..., i : i + stride * out[0] : stride, j : j + stride * out[1] : stride, :]
            total = total + seen[..., : out[0], : out[1], :] @ kernel[i, j]
    return total + layer["bias"]


def convolve(x: Array, node: Any) -> Array:
    """[batch, C, H, W], cross-correlation as in nir.Conv2d.

    Integers are multiplied as floats that hold every sum exactly: as float32 below 2^24, as float64 below 2^53. Most
    weights of a graph on a grid are 0: what no weight of a block of channels meets is left out.
    """
    (py, px), (sy, sx) = np.broadcast_to(node.padding, 2), np.broadcast_to(node.stride, 2)
    assert np.all(np.asarray(node.dilation) == 1) and node.groups == 1
    weights, kind = node.weight.reshape(len(node.weight), -1), x.dtype
    if kind.kind == "i":
        largest = np.abs(x).max(initial=0) * np.abs(weights.astype(np.int64)).sum(1).max()
        assert largest < 2**53
        exact = np.float32 if largest < 2**24 else np.float64
        x, weights = x.astype(exact), weights.astype(exact)
    padded = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, node.weight.shape[2:], (2, 3))[:, :, ::sy, ::sx]
    batch, _, height, width = windows.shape[:4]
    seen = windows.transpose(1, 4, 5, 0, 2, 3).reshape(weights.shape[1], -1)
    out = np.empty((len(weights), seen.shape[1]), np.result_type(weights, seen))
    for start in range(0, len(weights), BLOCK):
        block = weights[start : start + BLOCK]
        met = np.flatnonzero(block.any(0))
        out[start : start + BLOCK] = block[:, met] @ seen[met]
    whole = out.astype(kind) if kind.kind == "i" else out
    return whole.reshape(-1, batch, height, width).swapaxes(0, 1) + np.reshape(node.bias, (-1, 1, 1))


class Simulator:
    """Runs a graph step by step.

    Args:
        graph: What `nir.read` gave.
        batch: Samples side by side.
        dtype: Of states and values; int64 for a graph of integers.
    """

    def __init__(self, graph: Any, batch: int, dtype: Any) -> None:
        self.graph = graph
        self.sources: dict[str, list[str]] = defaultdict(list)
        for source, target in graph.edges:
            self.sources[target].append(source)
        self.kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
        self.state = {
            name: np.zeros((batch, *node.output_type["output"]), dtype)
            for name, node in graph.nodes.items()
            if self.kinds[name] in ("I", "LI", "IF", "LIF", "Delay")
        }
        for name, node in graph.nodes.items():
            if self.kinds[name] in ("IF", "LIF") and "initial_potential" in node.metadata:
                start = float(node.metadata["initial_potential"]) * node.v_threshold
                self.state[name] += start.astype(dtype) if self.kinds[name] == "IF" else start
        delays = {name for name, kind in self.kinds.items() if kind == "Delay"}
        within = {name: set(self.sources[name]) - delays for name in graph.nodes if name not in delays}
        self.order = list(graphlib.TopologicalSorter(within).static_order())

    def step(self, x: Array) -> dict[str, Array]:
        """One time step; the output of every node, by name."""
        values = {n: self.state[n] for n in self.graph.nodes if self.kinds[n] == "Delay"}
        for name in self.order:
            given: Any = x if self.kinds[name] == "Input" else sum(values[s] for s in self.sources[name])
            values[name] = self._compute(name, self.graph.nodes[name], given)
        for name, node in self.graph.nodes.items():
            if self.kinds[name] == "Delay":
                assert np.all(node.delay == 1)
                self.state[name] = np.asarray(sum(values[s] for s in self.sources[name]))
        return values

    def _compute(self, name: str, node: Any, given: Array) -> Array:
        kind = self.kinds[name]
        if kind in ("Input", "Output"):
            return given
        if kind == "Conv2d":
            return convolve(given, node)
        if kind == "Scale":
            return given * node.scale
        if kind == "Threshold":
            return (given > node.threshold).astype(given.dtype)
        v = self.state[name]
        if kind in ("I", "IF"):
            v = v + node.r * given
        else:
            assert kind in ("LI", "LIF"), f"{name}: {kind} nodes are unknown here"
            v = v + (node.v_leak - v + node.r * given) / node.tau
        self.state[name] = v
        return v if kind in ("I", "LI") else self._fire(name, node, v)

    def _fire(self, name: str, node: Any, v: Array) -> Array:
        """The spikes of an IF or LIF node, and its reset: to `v_reset`, as NIR says, or as the metadata say."""
        subtract = node.metadata.get("reset") == "subtract"
        fired = v >= node.v_threshold if node.metadata.get("fires_at_threshold") else v > node.v_threshold
        after = v - node.v_threshold if subtract else node.v_reset + 0 * v
        self.state[name] = np.where(fired, after, v)
        return fired.astype(v.dtype)
