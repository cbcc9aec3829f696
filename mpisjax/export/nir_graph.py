"""A trained network as a NIR graph, from image to class (Pedersen et al., "Neuromorphic intermediate
representation", 2024).

One time step is one unit of NIR's time. NIR's IF and LIF nodes reset to a value; these networks reset by subtraction,
so a population of neurons is written in nodes that NIR defines exactly:

    potential (I; LI with a leak) -> spikes (Threshold) -> before (Delay of 1) -> reset (Scale) -> potential

With w the potential that is compared with the threshold, one step of `mpisjax.neurons` is `w_t = leak *
(w_{t-1} - threshold * s_{t-1}) + current_t`, and forward Euler with step 1 on NIR's equations is the same for
`I(r = 1)` where leak is 1, and for `LI(tau = r = 1 / (1 - leak))`; the Scale is by `-leak * threshold`. NIR
fires above the threshold and these neurons at it: the exported threshold is the next smaller number. An
initial potential u0 moves the zero of w: threshold and v_leak are lower by `u0 / leak`.

NIR has no DBReLU, which stem and head hold. Each is written as a population of neurons, whose rate it is, or is left
to the host (`mpisjax.export.nir_host`), with its weights in the metadata.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import polyphase
from mpisjax.export.folded import Form, Network
from mpisjax.export.nir_nodes import Nodes
from mpisjax.export.polyphase import Folded


def to_nir(
    form: Form,
    network: Network,
    *,
    neurons: str = "exact",
    unrolled: int = 0,
    pixels: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> Any:
    """Writes a folded network as a NIR graph.

    Args:
        form: Which parts are neurons.
        network: What `fold_network` gave, or integers from `mpisjax.export.quantise`.
        neurons: "exact": a population as the four nodes above, whose equations are those of these neurons.
            "lif": one IF or LIF node, for targets that are told apart from the file to reset by subtraction,
            where to start, and to fire at the threshold: it is what the node's metadata say.
        unrolled: 0: feedback by Delay nodes. K: K copies of the streams, each fed by the one before it in the same
            step, without any feedback: what a target without recurrence can run.
        pixels: Kept in the metadata: how the host makes the input of pixels. See `nir_host.encode`.
        about: Anything JSON can hold, kept in the metadata.

    Returns:
        A `nir.NIRGraph`, channels first. The class is that of the largest sum of the output over the steps. Where
        the head is the host's, the outputs are the spikes of each stream's last layer. Populations lie on one
        grid, phases as channels (`mpisjax.export.polyphase`); `metadata["populations"]` has phases and true size
        of each.

    Raises:
        UserError: The network cannot be written, or `nir` is not installed.
    """
    if unrolled and not form.head_spikes and form.net.head == "fused":
        raise UserError("an unrolled graph holds its head: export it with head 'spikes'.")
    return _Writer(form, network, neurons).graph(unrolled, pixels or {}, about or {})


def check(form: Form) -> None:
    """Refuses what NIR cannot hold.

    Raises:
        UserError: The network has ternary or graded neurons, images that are not square, or bfloat16.
    """
    others = [kind for kind in form.net.neurons if kind != "lif"]
    if others:
        raise UserError(
            f"model.neurons has {others[0]!r}, whose spikes have other values than 0 and 1, which NIR's neurons do not "
            "fire: export the network as StableHLO, or train it with 'lif' in all layers."
        )
    if form.size[0] != form.size[1]:
        raise UserError(
            f"images of {form.size[0]} x {form.size[1]} cannot be exported to NIR, which checks kernels as "
            "squares: use square images"
        )
    if form.net.dtype is not None and np.dtype(form.net.dtype) not in (np.float32, np.float64):
        raise UserError("model.dtype is 'bfloat16', which NIR files cannot hold: set it to 'float32'.")


class _Writer(Nodes):
    """Writes the graph of one network."""

    def __init__(self, form: Form, network: Network, neurons: str) -> None:
        self.form, self.net, self.network, self.layers = form, form.net, network, network.layers
        self.stem = [*zip((*self.layers.stem, self.layers.inject), (*self.net.stem_strides, 1), strict=True)]
        self.halvings = self.net.num_streams - 1 + (1 if self.net.stride_layer else 0)
        dtype = self.layers.trans[0].kernel.dtype
        super().__init__(form.neuron, neurons, form.at(self.halvings)[0], np.int32 if dtype.kind == "i" else dtype)

    def phases(self, level: int) -> int:
        return 2 ** (self.halvings - level)

    def population(self, name: str, phases: int, *currents: str, start: str = "") -> str:
        """The neurons of one population; `start` is what its nodes' names begin with."""
        height, width, channels = self.form.populations()[name]
        threshold = self.network.thresholds[name]
        return self.fire(f"{start}{name.replace('/', '_')}", channels, phases, (height, width), threshold, *currents)

    def graph(self, unrolled: int, pixels: dict[str, Any], about: dict[str, Any]) -> Any:
        """The whole graph."""
        streams, depth = range(self.net.num_streams), len(self.net.layers)
        injected, spikes = self.injection(), list[str]()
        for number in range(1, max(unrolled, 1) + 1):
            start = f"pass{number}_" if unrolled else ""
            if unrolled and not spikes:  # nothing has fired yet: the feedback is its bias
                back = [self.constant(f"{start}stream{i + 1}_trans", i) for i in streams]
            else:
                back = [self.trans(f"{start}stream{i + 1}_trans", i, *spikes[i : i + 1]) for i in streams]
            spikes = self.one_pass(start, [[b, injected] if i == 0 else [b] for i, b in enumerate(back)])
        for i in streams if not unrolled else ():
            self.edges.append((self.delayed(f"stream{i + 1}_layer{depth}"), f"stream{i + 1}_trans"))
        self.outputs(spikes)
        metadata = {
            "about": json.dumps(about),
            "neurons": self.neurons,
            "threshold": float(np.asarray(self.neuron.threshold)),
            "leak": float(self.neuron.leak),
            "initial_potential": float(self.neuron.initial_potential),
            "populations": self.populations,
            "input": {
                "kind": "image" if self.form.stem_spikes else "current",
                "temporal": self.net.temporal,
                **pixels,
            },
            **self.host(),
        }
        return self.nir.NIRGraph(self.nodes, self.edges, metadata)

    def host(self) -> dict[str, Any]:
        """Weights of what the host computes."""
        found: dict[str, Any] = {}
        if not self.form.stem_spikes:
            layers = enumerate(self.stem, 1)
            found["stem"] = {f"layer{k}": {**layer._asdict(), "stride": s} for k, (layer, s) in layers}
        if not self.form.head_spikes and self.layers.head:
            head = {
                f"stream{i}_conv{h}": layer._asdict()
                for i, chain in enumerate(self.layers.head, 1)
                for h, layer in enumerate(chain, 1)
            }
            found["head"] = {**head, "classifier": self.layers.classifier._asdict()}
        return found

    def injection(self) -> str:
        """The input up to the current into stream 1."""
        form, side = self.form, self.form.size[0] if self.form.stem_spikes else self.form.base[0]
        channels = self.stem[0][0].kernel.shape[2] if form.stem_spikes else self.net.layers[0]
        source = self.add("input", self.nir.Input(input_type=np.array([channels, side, side])))
        if not form.stem_spikes:
            eye = np.eye(channels, dtype=self.dtype)[None, None]
            layer = Folded(eye, np.zeros(channels, self.dtype))
            return self.from_image("inject", layer, 1, side, self.phases(0), source)
        phases, on_grid = self.phases(0) * int(np.prod(self.net.stem_strides, dtype=int)), False
        for k, (layer, stride) in enumerate(self.stem, 1):
            last = k > len(self.net.stem)
            name = "inject" if last else f"stem_conv{k}"
            if on_grid:
                current = self.layer(name, layer, stride, (side, side), phases // stride, source)
            else:
                current = self.from_image(name, layer, stride, side, phases // stride, source)
            side, phases, on_grid = -(-side // stride), phases // stride, True
            if not last:
                source = self.population(f"stem/layer{k}", phases, current)
        return current

    def one_pass(self, start: str, currents: list[list[str]]) -> list[str]:
        """All layers of all streams, from the currents into layer 1; the names of the last layers' spikes."""
        for number in range(1, len(self.net.layers) + 1):
            if number == self.net.fusion_layer and self.net.num_streams > 1:
                currents = self.fuse(start, currents)
            spikes = []
            for i, sources in enumerate(currents):
                phases = self.phases(self.form.level(i, number))
                spikes.append(self.population(f"stream{i + 1}/layer{number}", phases, *sources, start=start))
            if number < len(self.net.layers):
                currents = [[self.conv(start, i, number + 1, s)] for i, s in enumerate(spikes)]
        return spikes

    def trans(self, name: str, i: int, *source: str) -> str:
        """The feedback; without a source, its edge is added once the last layer exists."""
        depth, stride = len(self.net.layers), 2 if self.net.stride_layer else 1
        first, layer = self.form.level(i, 1), self.layers.trans[i]
        phases, k = self.phases(self.form.level(i, depth)), layer.kernel.shape[0]
        self.count_weights((k, k, phases**2 * self.net.layers[-1], (stride * phases) ** 2 * self.net.layers[0]))
        kernel = polyphase.transposed_kernel(layer.kernel, stride, self.form.at(first), phases)
        return self.convolution(name, kernel, layer.bias, self.phases(first), *source)

    def constant(self, name: str, i: int) -> str:
        """The feedback's bias alone, as a convolution of the input with zeros."""
        channels, side, _ = (int(n) for n in self.nodes["input"].output_type["output"])
        first, bias = self.form.level(i, 1), self.layers.trans[i].bias
        zeros = np.zeros((1, 1, channels, len(bias)), self.layers.trans[i].kernel.dtype)
        stride = -(-side // self.form.at(first)[0])
        return self.from_image(name, Folded(zeros, bias), stride, side, self.phases(first), "input")

    def conv(self, start: str, i: int, number: int, source: str) -> str:
        """The convolution into layer `number`, from 2 on."""
        stride = 2 if number == self.net.stride_layer else 1
        size, phases = self.form.at(self.form.level(i, number - 1)), self.phases(self.form.level(i, number))
        layer = self.layers.feb[i][number - 2]
        return self.layer(f"{start}stream{i + 1}_conv{number}", layer, stride, size, phases, source)

    def fuse(self, start: str, currents: list[list[str]]) -> list[list[str]]:
        """The fusion (Eq. 6): to each stream's current are added those of all others, before any was fused.

        A Scale of ones sums the sources of a current; it is 0 outside the image.
        """
        layer_number, n = self.net.fusion_layer, self.net.num_streams
        width = self.net.layers[layer_number - 1]
        levels = [self.form.level(i, layer_number) for i in range(n)]

        def summed(name: str, level: int, *sources: str, gain: Any = 1) -> str:
            mask = self.mask(width, self.phases(level), self.form.at(level))
            gain = np.broadcast_to(np.asarray(gain, self.dtype), (width,))
            scale = mask * np.tile(gain, self.phases(level) ** 2)[:, None, None]
            return self.add(name, self.nir.Scale(scale=scale), *sources)

        own = [summed(f"{start}stream{i + 1}_current", levels[i], *sources) for i, sources in enumerate(currents)]
        fused: list[list[str]] = []
        for i in range(n):
            raised = [own[i]]
            for u in range(i + 1, n):
                phases, out = self.phases(levels[u]), self.phases(levels[i])
                kernel = polyphase.upsampling_kernel(width, 2 ** (u - i), phases).astype(self.dtype)
                self.count_weights(kernel.shape)
                name = f"{start}stream{u + 1}_to_stream{i + 1}"
                raised.append(self.convolution(name, kernel, np.zeros(width, self.dtype), out, own[u]))
            gain = self.network.gains[i]
            if np.ndim(gain) and np.any(gain != 1):
                raised = [summed(f"{start}stream{i + 1}_raised", levels[i], *raised, gain=gain)]
            fused.append(raised)
            for d in range(i):
                source = own[d]
                for hop, layer in enumerate(self.layers.down[i][d]):
                    level = levels[d] + hop
                    name = f"{start}stream{d + 1}_to_stream{i + 1}_conv{hop + 1}"
                    source = self.layer(name, layer, 2, self.form.at(level), self.phases(level + 1), source)
                    if hop < i - d - 1:
                        source = summed(f"{name}_inside", level + 1, source)
                fused[i].append(source)
        return fused

    def outputs(self, spikes: list[str]) -> None:
        """The class scores of a head in the graph, or the spikes that the host's head reads."""
        depth, n = len(self.net.layers), self.net.num_streams
        levels = [self.form.level(i, depth) for i in range(n)]
        if not self.form.head_spikes and self.net.head == "fused":
            for i, name in enumerate(spikes):
                shape = np.array(self.nodes[name].output_type["output"])
                self.add(f"output_stream{i + 1}", self.nir.Output(output_type=shape), name)
            return
        source = spikes[-1]
        if self.net.head == "fused":
            currents = []
            for i, chain in enumerate(self.layers.head):
                source, stride = spikes[i], 2 if i < n - 1 else 1
                for h, layer in enumerate(chain):
                    level = levels[i] + h
                    size, phases = self.form.at(level), self.phases(level + (1 if i < n - 1 else 0))
                    source = self.layer(f"head_stream{i + 1}_conv{h + 1}", layer, stride, size, phases, source)
                    if h < len(chain) - 1:
                        ones = self.mask(self.net.layers[-1], phases, self.form.at(level + 1))
                        source = self.add(f"{source}_inside", self.nir.Scale(scale=ones), source)
                currents.append(source)
            source = self.population("head", 1, *currents)
        scores = self.dense("classifier", self.layers.classifier, self.net.layers[-1], source)
        shape = np.array(self.nodes[scores].output_type["output"])
        self.add("output", self.nir.Output(output_type=shape), scores)
