"""The streams of a trained network as a NIR graph (Pedersen et al., "Neuromorphic intermediate
representation", 2024).

The graph holds what spikes: every weight with its normalisation folded in, every neuron, the fusion, the
feedback. One time step is one unit of NIR's time. NIR's IF and LIF nodes reset to a value; these networks
reset by subtraction, so a population of neurons is written in nodes that NIR defines exactly:

    potential (I; LI with a leak) -> spikes (Threshold) -> before (Delay of 1) -> reset (Scale) -> potential

With w the potential that is compared with the threshold, one step of `mpisjax.neurons` is `w_t = leak *
(w_{t-1} - threshold * s_{t-1}) + current_t`, and forward Euler with step 1 on NIR's equations is the same for
`I(r = 1)` where leak is 1, and for `LI(tau = r = 1 / (1 - leak))`; the Scale is by `-leak * threshold`. NIR
fires above the threshold and these neurons at it: the exported threshold is the next smaller number. An
initial potential u0 moves the zero of w: threshold and v_leak are lower by `u0 / leak`.

What NIR has no node for, DBReLU of the stem (of a constant input) and of the head, stays with the host: the
graph takes the stem's output, puts out the spikes of the last layers, and carries stem and head in its
metadata.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import polyphase
from mpisjax.export.nir_host import LayerCall, fold_layer, head_weights
from mpisjax.export.nir_nodes import Nodes
from mpisjax.export.polyphase import Folded, Size
from mpisjax.neurons import LIF
from mpisjax.nn.convolution import halved
from mpisjax.nn.mpis import MPIS

NEURONS = ("exact", "lif")


def to_nir(
    net: MPIS,
    variables: dict[str, Any],
    neuron: LIF,
    image_shape: tuple[int, int, int],
    *,
    neurons: str = "exact",
    about: dict[str, Any] | None = None,
) -> Any:
    """Writes the streams of a network as a NIR graph.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        neuron: The neurons' constants.
        image_shape: Height, width and channels of an image (of a frame, for input over time).
        neurons: "exact": a population as the four nodes above, whose equations are those of these neurons.
            "lif": one IF or LIF node, for targets that are told apart from the file to reset by subtraction:
            it is what the node's metadata say, but NIR's own equations reset to `v_reset`.
        about: Anything JSON can hold, kept in the metadata.

    Returns:
        A `nir.NIRGraph`. Its input, channels first, is the stem's output (input over time: a frame), its
        outputs the spikes of each stream's last layer. Populations lie on one grid, phases as channels
        (`mpisjax.export.polyphase`); `metadata["populations"]` has phases and true size of each.

    Raises:
        UserError: The network cannot be written, or `nir` is not installed.
    """
    if net.learn_threshold or net.neurons:
        raise UserError(
            "the network has neurons or thresholds of its own by layer (model.neurons, model.learn_threshold), which are not "
            "written to NIR: export a network without, or as StableHLO."
        )
    if neurons not in NEURONS:
        raise UserError(f"neurons is {neurons!r}: choose {' or '.join(map(repr, NEURONS))}.")
    if image_shape[0] != image_shape[1]:
        raise UserError(
            f"images of {image_shape[0]} x {image_shape[1]} cannot be exported to NIR, which checks kernels "
            "as squares: "
            "use square images"
        )
    if net.dtype is not None and np.dtype(net.dtype) not in (np.float32, np.float64):
        raise UserError("model.dtype is 'bfloat16', which NIR files cannot hold: set it to 'float32'.")
    if neurons == "lif" and neuron.initial_potential:
        raise UserError(
            f"neuron.initial_potential is {neuron.initial_potential}, which NIR's IF and LIF nodes cannot "
            "hold: export "
            "with neurons 'exact'."
        )
    return _Writer(net, variables, neuron, image_shape, neurons).graph(about or {})


class _Writer(Nodes):
    """Writes the graph of one network."""

    def __init__(
        self,
        net: MPIS,
        variables: dict[str, Any],
        neuron: LIF,
        image_shape: tuple[int, int, int],
        neurons: str,
    ) -> None:
        self.net, self.variables, self.image_shape = net, variables, image_shape
        self.base = image_shape[0]
        for stride in net.stem_strides:
            self.base = -(-self.base // stride)
        self.halvings = net.num_streams - 1 + (1 if net.stride_layer else 0)
        dtype = np.asarray(jax.tree.leaves(variables["params"])[0]).dtype
        super().__init__(neuron, neurons, halved(self.base, self.halvings), dtype)

    def level(self, stream: int, layer: int) -> int:
        """How often the resolution is halved between the stem and a layer."""
        return stream + (1 if self.net.stride_layer and layer >= self.net.stride_layer else 0)

    def phases(self, level: int) -> int:
        return 2 ** (self.halvings - level)

    def size(self, level: int) -> Size:
        return (halved(self.base, level),) * 2

    def fold(self, call: LayerCall, kernel: int, stride: int, channels: int) -> Folded:
        return fold_layer(self.net, self.variables, call, kernel, stride, channels)

    def graph(self, about: dict[str, Any]) -> Any:
        """The whole graph."""
        depth, streams = len(self.net.layers), range(self.net.num_streams)
        stem, injected = self.stem_and_injection()
        currents = [[self.trans(i)] + ([injected] if i == 0 else []) for i in streams]
        for number in range(1, depth + 1):
            if number == self.net.fusion_layer and len(streams) > 1:
                currents = self.fuse(currents)
            spikes = []
            for i in streams:
                level, features = self.level(i, number), self.net.layers[number - 1]
                name = f"stream{i + 1}_layer{number}"
                spikes.append(self.fire(name, features, self.phases(level), self.size(level), *currents[i]))
            if number < depth:
                currents = [[self.conv(i, number + 1, spikes[i])] for i in streams]
        for i, name in enumerate(spikes):
            shape = self.nodes[name].output_type["output"]
            self.add(f"output_stream{i + 1}", self.nir.Output(output_type=np.array(shape)), name)
            feedback = self.delayed(f"stream{i + 1}_layer{depth}")
            self.edges.append((feedback, f"stream{i + 1}_trans"))
        metadata = {
            "about": json.dumps(about),
            "neurons": self.neurons,
            "threshold": float(np.asarray(self.neuron.threshold)),
            "leak": float(self.neuron.leak),
            "initial_potential": float(self.neuron.initial_potential),
            "populations": self.populations,
            "head": head_weights(self.net, self.variables),
        }
        return self.nir.NIRGraph(self.nodes, self.edges, {**metadata, **({"stem": stem} if stem else {})})

    def stem_and_injection(self) -> tuple[dict[str, Any], str]:
        """The stem and the injection into stream 1.

        Frames drive the stem's neurons in every step, so that its layers are nodes. The stem of a constant
        image is not spiking: its weights go to the host, and the graph begins with the injection.

        Returns:
            The weights of the host's stem by layer, and the node of the injected current.
        """
        net, k = self.net, self.net.kernel_size
        channels, side = self.image_shape[2], self.image_shape[0]
        stem: dict[str, Any] = {}
        source, on_grid = self.input(channels, side) if net.temporal else "", False
        phases = self.phases(0) * int(np.prod(net.stem_strides, dtype=int))

        def project(name: str, layer: Folded, stride: int) -> str:
            if on_grid:
                return self.layer(name, layer, stride, (side, side), phases // stride, source)
            return self.from_image(name, layer, stride, side, phases // stride, source)

        for number, (features, stride) in enumerate(zip(net.stem, net.stem_strides, strict=True), 1):
            layer = self.fold(lambda m, x, i=number - 1: m.stem_layers[i](x, False), k, stride, channels)
            if net.temporal:
                current = project(f"stem_conv{number}", layer, stride)
            else:
                stem[f"layer{number}"] = {**layer._asdict(), "stride": stride}
            side, phases, channels = -(-side // stride), phases // stride, features
            if net.temporal:
                source = self.fire(f"stem_layer{number}", features, phases, (side, side), current)
                on_grid = True
        if not net.temporal:
            source = self.input(channels, side)
        layer = self.fold(lambda m, x: m.inject(x, False), k, 1, channels)
        return stem, project("inject", layer, 1)

    def input(self, channels: int, side: int) -> str:
        """The graph's input."""
        return self.add("input", self.nir.Input(input_type=np.array([channels, side, side])))

    def trans(self, i: int) -> str:
        """The feedback; its edge from the last layer is added once that layer exists."""
        net, k = self.net, self.net.kernel_size
        depth, stride = len(net.layers), 2 if net.stride_layer else 1
        first, last = self.level(i, 1), self.level(i, depth)
        size = self.size(first)

        def call(module: Any, x: Any) -> Any:
            return module.trans[i](x, False, size)

        # At its true size, because a bounded operator norm holds for one size.
        layer = polyphase.fold_transposed(
            lambda x: self.net.apply(self.variables, x, method=call), k, stride, net.layers[-1], size
        )
        phases = self.phases(last)
        self.count_weights((k, k, phases**2 * net.layers[-1], (stride * phases) ** 2 * net.layers[0]))
        kernel = polyphase.transposed_kernel(layer.kernel, stride, size, phases)
        return self.convolution(f"stream{i + 1}_trans", kernel, layer.bias, self.phases(first))

    def conv(self, i: int, number: int, source: str) -> str:
        """The convolution into layer `number`, from 2 on."""
        net, stride = self.net, 2 if number == self.net.stride_layer else 1
        layer = self.fold(
            lambda m, x: m.feb[i][number - 2](x, False), net.kernel_size, stride, net.layers[number - 2]
        )
        size, phases = self.size(self.level(i, number - 1)), self.phases(self.level(i, number))
        return self.layer(f"stream{i + 1}_conv{number}", layer, stride, size, phases, source)

    def fuse(self, currents: list[list[str]]) -> list[list[str]]:
        """The fusion (Eq. 6): to each stream's current are added those of all others, before any was fused.

        A Scale of ones sums the sources of a current; it is 0 outside the image.
        """
        net, layer_number = self.net, self.net.fusion_layer
        width = net.layers[layer_number - 1]
        levels = [self.level(i, layer_number) for i in range(net.num_streams)]

        def summed(name: str, level: int, *sources: str) -> str:
            scale = self.mask(width, self.phases(level), self.size(level))
            return self.add(name, self.nir.Scale(scale=scale), *sources)

        own = [summed(f"stream{i + 1}_current", levels[i], *sources) for i, sources in enumerate(currents)]
        fused = [[name] for name in own]
        for i in range(net.num_streams):
            for d in range(i):
                source = own[d]
                for hop in range(i - d):
                    layer = self.fold(
                        lambda m, x, i=i, d=d, hop=hop: m.down[i][d][hop](x, False), net.kernel_size, 2, width
                    )
                    level, name = levels[d] + hop, f"stream{d + 1}_to_stream{i + 1}_conv{hop + 1}"
                    source = self.layer(name, layer, 2, self.size(level), self.phases(level + 1), source)
                    if hop < i - d - 1:
                        source = summed(f"{name}_inside", level + 1, source)
                fused[i].append(source)
            for u in range(i + 1, net.num_streams):
                phases = self.phases(levels[u])
                kernel = polyphase.upsampling_kernel(width, 2 ** (u - i), phases).astype(self.dtype)
                self.count_weights(kernel.shape)
                out = self.phases(levels[i])
                name = f"stream{u + 1}_to_stream{i + 1}"
                fused[i].append(self.convolution(name, kernel, np.zeros(width, self.dtype), out, own[u]))
        return fused
