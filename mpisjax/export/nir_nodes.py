"""NIR nodes for layers and populations on one grid (`mpisjax.export.polyphase`): written, and found in a graph.

A population of neurons is one IF or LIF node, or the four nodes that reset by subtraction (`nir_graph`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import polyphase
from mpisjax.export.polyphase import Folded, Size
from mpisjax.neurons import LIF

MAX_WEIGHTS = 2**26  # of a whole graph: 256 MiB of float32


def package() -> Any:
    """The `nir` package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import nir
    except ImportError as error:
        raise UserError("NIR needs the nir package: pip install nir") from error
    return nir


class Nodes:
    """The nodes and edges written so far. The name of a population or a current is that of the node that
    gives it.

    Args:
        neuron: The neurons' constants.
        neurons: "exact" or "lif"; see `mpisjax.export.nir_graph.to_nir`.
        side: Of the grid.
        dtype: Of thresholds and of weights that are not given: a float, or int32 for integer arithmetic.
    """

    def __init__(self, neuron: LIF, neurons: str, side: int, dtype: Any) -> None:
        self.nir, self.neuron, self.neurons = package(), neuron, neurons
        self.side, self.dtype = side, np.dtype(dtype)
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.populations: dict[str, Any] = {}
        self.weights = 0

    def add(self, name: str, node: Any, *sources: str) -> str:
        """Adds a node with edges from its sources; gives its name."""
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return name

    def mask(self, channels: int, phases: int, size: Size) -> np.ndarray:
        """1 where the grid is image, [channels of the grid, side, side]."""
        ones = np.ones((*size, channels), self.dtype)
        return np.moveaxis(polyphase.space_to_depth(ones, phases, (self.side, self.side)), -1, 0)

    def count_weights(self, shape: tuple[int, ...]) -> None:
        """Refuses a graph of more than `MAX_WEIGHTS` weights."""
        self.weights += int(np.prod(shape, dtype=np.int64))
        if self.weights > MAX_WEIGHTS:
            raise UserError(
                f"as a NIR graph this network has more than {MAX_WEIGHTS:,} weights, since NIR has no "
                "transposed convolution and no upsampling; export it to StableHLO, or a network with fewer "
                "channels or streams"
            )

    def conv2d(
        self, name: str, kernel: np.ndarray, bias: np.ndarray, side: int, stride: int, padding: int, *sources: str
    ) -> str:
        """A Conv2d node from a kernel [k, k, in, out]."""
        weight = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        node = self.nir.Conv2d(
            input_shape=(side, side), weight=weight, stride=stride, padding=padding, dilation=1, groups=1, bias=bias
        )
        return self.add(name, node, *sources)

    def convolution(self, name: str, kernel: np.ndarray, bias: np.ndarray, phases: int, *sources: str) -> str:
        """A convolution on the grid."""
        return self.conv2d(name, kernel, np.tile(bias, phases**2), self.side, 1, kernel.shape[0] // 2, *sources)

    def layer(self, name: str, layer: Folded, stride: int, size: Size, phases: int, source: str) -> str:
        """A layer whose input and output lie on the grid; `size` is the input's, `phases` the output's."""
        k, _, c_in, c_out = layer.kernel.shape
        self.count_weights((k, k, (stride * phases) ** 2 * c_in, phases**2 * c_out))
        kernel = polyphase.conv_kernel(layer.kernel, stride, size, phases)
        return self.convolution(name, kernel, layer.bias, phases, source)

    def from_image(self, name: str, layer: Folded, stride: int, size: int, phases: int, source: str) -> str:
        """A layer from the input image, as it is, to the grid."""
        k, _, c_in, c_out = layer.kernel.shape
        self.count_weights((stride * phases + k, stride * phases + k, c_in, phases**2 * c_out))
        kernel, stride, padding = polyphase.input_kernel(layer.kernel, stride, size, self.side, phases)
        return self.conv2d(name, kernel, np.tile(layer.bias, phases**2), size, stride, padding, source)

    def dense(self, name: str, layer: Folded, channels: int, source: str) -> str:
        """A dense layer of everything on the grid, one phase, as a convolution with one output pixel.

        Importers read this alike. Flatten counts the batch axis in some and not in others.
        """
        kernel = layer.kernel.reshape(self.side, self.side, channels, -1)
        self.count_weights(kernel.shape)
        return self.conv2d(name, kernel, layer.bias, self.side, 1, 0, source)

    def fire(self, name: str, channels: int, phases: int, size: Size, threshold: Any, *currents: str) -> str:
        """A population of neurons; those that lie outside the image never fire. `threshold`: [] or [channels]."""
        inside, leak, start = self.mask(channels, phases, size), self.neuron.leak, self.neuron.initial_potential
        per_channel = np.tile(np.broadcast_to(np.asarray(threshold, self.dtype), (channels,)), phases**2)
        threshold = np.broadcast_to(per_channel[:, None, None], inside.shape)
        largest = np.iinfo(self.dtype).max if self.dtype.kind == "i" else np.finfo(self.dtype).max
        ones = np.ones_like(inside)
        tau = ones / (1 - leak) if leak < 1 else ones
        self.populations[name] = {"phases": phases, "channels": channels, "height": size[0], "width": size[1]}
        if self.neurons == "lif":
            limits = np.where(inside > 0, threshold, largest).astype(self.dtype)
            before_leak = float(start) / leak
            about = {"reset": "subtract", "initial_potential": before_leak, "fires_at_threshold": True}
            if leak == 1:
                node = self.nir.IF(r=ones, v_threshold=limits, metadata=about)
            else:
                node = self.nir.LIF(tau=tau, r=tau, v_leak=0 * ones, v_threshold=limits, metadata=about)
            return self.add(f"{name}_spikes", node, *currents)
        # NIR's neurons start from rest and fire above their threshold: it is lower by the start, and the next smaller.
        shift = (start * threshold / leak).astype(self.dtype)
        if self.dtype.kind == "i":
            limits = np.ceil(threshold * (1 - start)).astype(self.dtype) - 1
        else:
            limits = np.nextafter(threshold - shift, self.dtype.type(-np.inf))
        limits = np.where(inside > 0, limits, largest).astype(self.dtype)
        potential = self.nir.I(r=ones) if leak == 1 else self.nir.LI(tau=tau, r=tau, v_leak=-shift)
        self.add(f"{name}_potential", potential, *currents)
        spikes = self.add(f"{name}_spikes", self.nir.Threshold(threshold=limits), f"{name}_potential")
        before = self.delayed(name)
        taken = -threshold if leak == 1 else (-leak * threshold).astype(self.dtype)
        reset = self.add(f"{name}_reset", self.nir.Scale(scale=taken), before)
        self.edges.append((reset, f"{name}_potential"))
        return spikes

    def delayed(self, name: str) -> str:
        """A population's spikes of the previous step."""
        if f"{name}_before" not in self.nodes:
            shape = self.nodes[f"{name}_spikes"].output_type["output"]
            self.add(f"{name}_before", self.nir.Delay(delay=np.ones(shape, self.dtype)), f"{name}_spikes")
        return f"{name}_before"


class Population(NamedTuple):
    """Neurons of one kind.

    Attributes:
        name: Of the node that puts out the spikes.
        neuron: With a threshold that is a number, or has the population's shape.
        gain: What a current is multiplied by.
        sources: The nodes whose outputs are its current.
        inside: The nodes that are part of it, beside that of its name.
    """

    name: str
    neuron: LIF
    gain: np.ndarray
    sources: tuple[str, ...]
    inside: tuple[str, ...]


def find_populations(graph: Any, reset: str) -> dict[str, Population]:
    """The populations of a graph, by the name of the node that gives their spikes.

    Raises:
        UserError: An integrator or a Threshold stands alone, or the neurons' equations are others.
    """
    into: dict[str, list[str]] = {name: [] for name in graph.nodes}
    out: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        into[target].append(source)
        out[source].append(target)
    found = {}
    for name, node in graph.nodes.items():
        kind = type(node).__name__
        if kind in ("IF", "LIF"):
            found[name] = _single(name, node, reset, into[name])
        elif kind in ("I", "LI"):
            population = _of_four(graph, name, node, into, out)
            found[population.name] = population
    for name, node in graph.nodes.items():
        if type(node).__name__ == "Threshold" and name not in found:
            raise UserError(f"the Threshold {name!r} follows no potential that it resets.")
    return found


def _single(name: str, node: Any, reset: str, sources: list[str]) -> Population:
    about = node.metadata or {}
    if reset != "subtract" and about.get("reset") != "subtract":
        raise UserError(
            f"the node {name!r} resets to a value, as NIR's {type(node).__name__} does, and so has no rate: give "
            "reset='subtract' if its neurons reset by subtraction."
        )
    leak, gain = _leak_and_gain(name, node)
    threshold = np.asarray(node.v_threshold, float)
    if not about.get("fires_at_threshold"):
        threshold = np.nextafter(np.asarray(node.v_threshold), np.inf).astype(float)
    start = float(about.get("initial_potential", 0.0)) * leak
    if np.any(np.asarray(getattr(node, "v_leak", 0.0)) != 0):
        raise UserError(f"the node {name!r} has a v_leak other than 0, which is not read.")
    return Population(name, _neuron(name, threshold, leak, start), gain, tuple(sources), ())


def _of_four(graph: Any, name: str, node: Any, into: dict[str, list[str]], out: dict[str, list[str]]) -> Population:
    """potential -> spikes (Threshold) -> before (Delay) -> reset (Scale) -> potential."""
    kinds = {n: type(graph.nodes[n]).__name__ for n in graph.nodes}
    spikes = [n for n in out[name] if kinds[n] == "Threshold"]
    resets = [
        (n, before)
        for n in into[name]
        if kinds[n] == "Scale" and len(into[n]) == 1
        for before in into[n]
        if kinds[before] == "Delay" and into[before] == spikes
    ]
    if len(out[name]) != 1 or len(spikes) != 1 or len(resets) != 1 or into[spikes[0]] != [name]:
        raise UserError(
            f"the potential {name!r} is not that of a neuron: a Threshold, a Delay of 1 and a Scale must reset it."
        )
    reset, before = resets[0]
    leak, gain = _leak_and_gain(name, node)
    scale = np.asarray(graph.nodes[reset].scale)
    limit = np.asarray(graph.nodes[spikes[0]].threshold)
    threshold = -scale.astype(float) * np.asarray(gain, float) / leak
    if not np.all(threshold > 0):
        raise UserError(f"the Scale {reset!r} takes nothing from the potential {name!r}: it must be below 0.")
    largest = np.iinfo(limit.dtype).max if limit.dtype.kind == "i" else np.finfo(limit.dtype).max
    silent = limit >= largest
    fires_at = limit.astype(float) + 1 if limit.dtype.kind == "i" else np.nextafter(limit, np.inf).astype(float)
    digits = 12 if limit.dtype == np.float64 or limit.dtype.kind == "i" else 6
    shares = np.unique(np.round(((threshold - fires_at) * leak / threshold)[~silent], digits))
    if len(shares) != 1 or not -1e-6 <= shares[0] < 1:
        raise UserError(
            f"the Threshold {spikes[0]!r} and the Scale {reset!r} are not those of one neuron: the potential must "
            "start between 0 and the threshold."
        )
    if hasattr(node, "v_leak") and not np.allclose(
        node.v_leak, (fires_at - threshold) * ~silent + node.v_leak * silent
    ):
        raise UserError(f"the v_leak of {name!r} is not where its neurons start, which is not read.")
    start = max(float(shares[0]), 0.0)
    neuron = _neuron(spikes[0], np.where(silent, float(largest), threshold), leak, start)
    current = tuple(n for n in into[name] if n != reset)
    inside = (name, reset) + ((before,) if out[before] == [reset] else ())
    return Population(spikes[0], neuron, gain, current, inside)


def _leak_and_gain(name: str, node: Any) -> tuple[float, np.ndarray]:
    """v' = leak v + gain current."""
    r = np.asarray(node.r, float)
    if not hasattr(node, "tau"):
        return 1.0, _one(r)
    tau = np.asarray(node.tau, float)
    if not np.all(tau >= 1):
        raise UserError(f"tau of the node {name!r} is below one step.")
    leaks = np.unique(np.round(1 - 1 / tau, 6))
    if len(leaks) != 1 or leaks[0] <= 0:
        raise UserError(f"the neurons of {name!r} have several leaks, or none that a step keeps: give one tau above 1.")
    return float(np.mean(1 - 1 / tau)) if np.ptp(tau) else float(1 - 1 / tau.flat[0]), _one(np.round(r / tau, 12))


def _one(values: np.ndarray) -> np.ndarray:
    """One number where all are equal."""
    return values.reshape(-1)[0] if values.size and np.ptp(values) == 0 else values


def _neuron(name: str, threshold: np.ndarray, leak: float, start: float) -> LIF:
    if not np.all(threshold > 0):
        raise UserError(f"the threshold of {name!r} is not above 0.")
    value: Any = _one(threshold)
    value = float(value) if np.ndim(value) == 0 else value
    if not 0 <= start < 1:
        raise UserError(f"the neurons of {name!r} start at {start} thresholds: from 0 to below 1 is read.")
    return dataclasses.replace(LIF(leak=round(leak, 12), initial_potential=round(start, 12)), threshold=value)
