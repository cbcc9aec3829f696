"""NIR nodes for layers and populations that lie on one grid (`mpisjax.export.polyphase`)."""

from __future__ import annotations

from typing import Any

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
        raise UserError("an export to NIR needs the nir package: pip install 'mpisjax[nir]'") from error
    return nir


class Nodes:
    """The nodes and edges written so far. The name of a population or a current is that of the node that
    gives it.

    Args:
        neuron: The neurons' constants.
        neurons: "exact" or "lif"; see `mpisjax.export.nir_graph.to_nir`.
        side: Of the grid.
        dtype: Of weights and thresholds.
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
                "transposed "
                "convolution and no upsampling; export it to StableHLO, or a network with fewer channels or "
                "streams"
            )

    def convolution(self, name: str, kernel: np.ndarray, bias: np.ndarray, phases: int, *sources: str) -> str:
        """A convolution on the grid."""
        weight = kernel.transpose(3, 2, 0, 1)
        node = self.nir.Conv2d(
            input_shape=(self.side, self.side), weight=np.ascontiguousarray(weight), stride=1,
            padding=kernel.shape[0] // 2, dilation=1, groups=1, bias=np.tile(bias, phases**2),
        )  # fmt: skip
        return self.add(name, node, *sources)

    def layer(self, name: str, layer: Folded, stride: int, size: Size, phases: int, source: str) -> str:
        """A layer whose input and output lie on the grid; `size` is the input's, `phases` the output's."""
        k, _, c_in, c_out = layer.kernel.shape
        self.count_weights((k, k, (stride * phases) ** 2 * c_in, phases**2 * c_out))
        return self.convolution(
            name, polyphase.conv_kernel(layer.kernel, stride, size, phases), layer.bias, phases, source
        )

    def from_image(self, name: str, layer: Folded, stride: int, size: int, phases: int, source: str) -> str:
        """A layer from the input image, as it is, to the grid."""
        k, _, c_in, c_out = layer.kernel.shape
        self.count_weights((stride * phases + k, stride * phases + k, c_in, phases**2 * c_out))
        found = polyphase.input_kernel(layer.kernel, stride, size, self.side, phases)
        node = self.nir.Conv2d(
            input_shape=(size, size), weight=np.ascontiguousarray(found.kernel.transpose(3, 2, 0, 1)),
            stride=found.stride, padding=found.padding, dilation=1, groups=1,
            bias=np.tile(layer.bias, phases**2),
        )  # fmt: skip
        return self.add(name, node, source)

    def fire(self, name: str, channels: int, phases: int, size: Size, *currents: str) -> str:
        """A population of neurons; those that lie outside the image never fire."""
        inside = self.mask(channels, phases, size)
        threshold, leak = self.dtype.type(self.neuron.threshold), self.neuron.leak
        shift = self.dtype.type(self.neuron.initial_potential * self.neuron.threshold / leak)
        fires_above = np.nextafter(threshold - shift, self.dtype.type(-np.inf))
        limits = np.where(inside > 0, fires_above, np.finfo(self.dtype).max)
        ones = np.ones_like(inside)
        self.populations[name] = {
            "phases": phases, "channels": channels, "height": size[0], "width": size[1],
        }  # fmt: skip
        if self.neurons == "lif":
            about = {"reset": "subtract", "subtracted": float(threshold)}
            if leak == 1:
                node = self.nir.IF(r=ones, v_threshold=limits, metadata=about)
            else:
                tau = ones / (1 - leak)
                node = self.nir.LIF(tau=tau, r=tau, v_leak=0 * ones, v_threshold=limits, metadata=about)
            return self.add(f"{name}_spikes", node, *currents)
        if leak == 1:
            potential = self.nir.I(r=ones)
        else:
            tau = ones / (1 - leak)
            potential = self.nir.LI(tau=tau, r=tau, v_leak=-shift * ones)
        self.add(f"{name}_potential", potential, *currents)
        spikes = self.add(f"{name}_spikes", self.nir.Threshold(threshold=limits), f"{name}_potential")
        before = self.delayed(name)
        reset = self.add(f"{name}_reset", self.nir.Scale(scale=-leak * threshold * ones), before)
        self.edges.append((reset, f"{name}_potential"))
        return spikes

    def delayed(self, name: str) -> str:
        """A population's spikes of the previous step."""
        if f"{name}_before" not in self.nodes:
            shape = self.nodes[f"{name}_spikes"].output_type["output"]
            self.add(f"{name}_before", self.nir.Delay(delay=np.ones(shape, self.dtype)), f"{name}_spikes")
        return f"{name}_before"
