"""A trained network with everything folded in: plain convolutions between populations of neurons.

Weight norm and batch normalisation disappear into kernels and biases. What is left is what a chip holds: linear maps,
thresholds and spikes. Stem and head can be populations of neurons too. A neuron's rate is the DBReLU that it replaces,
so the equilibrium stays the same; only the spikes' rounding is new.

The folded network is a transition like any other. `mpisjax.simulate` runs it and `mpisjax.equilibrium_forward`
differentiates it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.export import polyphase
from mpisjax.export.polyphase import Folded
from mpisjax.neurons import LIF, dbrelu
from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved, upsample
from mpisjax.nn.mpis import MPIS

Array = jax.Array


class Layers(NamedTuple):
    """The linear maps; streams and hops count from 0.

    Attributes:
        stem: By layer.
        inject: From the stem's output to stream 1.
        trans: The feedback, by stream.
        feb: `feb[i][k]` leads to stream i's layer k + 2.
        down: `down[i][d][hop]`: the chain from stream d to stream i at the fusion.
        head: `head[i][hop]`: the chain from stream i to the head, the head's mix folded into its last hop; of the
            last stream the mix alone. Empty for the head "smallest".
        classifier: Kernel [features, classes], in the order height, width, channel.
    """

    stem: tuple[Folded, ...]
    inject: Folded
    trans: tuple[Folded, ...]
    feb: tuple[tuple[Folded, ...], ...]
    down: tuple[tuple[tuple[Folded, ...], ...], ...]
    head: tuple[tuple[Folded, ...], ...]
    classifier: Folded


class Network(NamedTuple):
    """Linear maps and what the neurons make of them. A pytree: the parameters of `transition`.

    Attributes:
        layers: See there.
        thresholds: By population: a number, or [channels].
        gains: By stream: a number or [channels] that its own and the upsampled currents are multiplied by at the
            fusion. 1, unless the weights are integers of different scales.
    """

    layers: Layers
    thresholds: dict[str, Any]
    gains: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """Which parts are neurons.

    Attributes:
        net: The network.
        neuron: The neurons' constants.
        size: Height and width of an image.
        stem: "spikes": the stem's layers are neurons and the input is the image. "host": the stem is computed
            beforehand and the input is the current that it injects into stream 1. Frames always drive neurons.
        head: "spikes": the head's DBReLU is a population, "head". "host": the head is computed afterwards, from the
            streams' rates.
    """

    net: MPIS
    neuron: LIF
    size: tuple[int, int]
    stem: str = "spikes"
    head: str = "spikes"

    @property
    def stem_spikes(self) -> bool:
        """Whether the stem is neurons."""
        return self.net.temporal or self.stem == "spikes"

    @property
    def head_spikes(self) -> bool:
        """Whether there is a population "head"."""
        return self.net.head == "fused" and self.head == "spikes"

    @property
    def threshold(self) -> float:
        """The neurons' threshold."""
        threshold: Any = self.neuron.threshold
        return float(threshold)

    @property
    def base(self) -> tuple[int, int]:
        """Height and width of the stem's output."""
        height, width = self.size
        for stride in self.net.stem_strides:
            height, width = -(-height // stride), -(-width // stride)
        return height, width

    def level(self, stream: int, layer: int) -> int:
        """How often the resolution is halved between the stem and a layer; streams from 0, layers from 1."""
        return stream + (1 if self.net.stride_layer and layer >= self.net.stride_layer else 0)

    def at(self, level: int) -> tuple[int, int]:
        """Height and width at a level."""
        return halved(self.base[0], level), halved(self.base[1], level)

    def populations(self) -> dict[str, tuple[int, int, int]]:
        """Height, width and channels by population."""
        net, found, (height, width) = self.net, dict[str, tuple[int, int, int]](), self.size
        for k, (channels, stride) in enumerate(zip(net.stem, net.stem_strides, strict=True), 1):
            height, width = -(-height // stride), -(-width // stride)
            found |= {f"stem/layer{k}": (height, width, channels)} if self.stem_spikes else {}
        for i in range(net.num_streams):
            for k, channels in enumerate(net.layers, 1):
                found[f"stream{i + 1}/layer{k}"] = (*self.at(self.level(i, k)), channels)
        return found | ({"head": found[f"stream{net.num_streams}/layer{len(net.layers)}"]} if self.head_spikes else {})

    def initial_rates(self, batch: int) -> dict[str, Array]:
        """Zeros of the rates' shapes."""
        sizes, depth = self.populations(), len(self.net.layers)
        shapes = {f"stream{i}": sizes[f"stream{i}/layer{depth}"] for i in range(1, self.net.num_streams + 1)}
        shapes |= {"head": sizes["head"]} if self.head_spikes else {}
        return {name: jnp.zeros((batch, *shape)) for name, shape in shapes.items()}


def fold_network(form: Form, variables: dict[str, Any]) -> Network:
    """Folds a trained network, in the dtype of its variables."""
    net, k = form.net, form.net.kernel_size
    depth, n, width = len(net.layers), net.num_streams, net.layers[net.fusion_layer - 1]

    def conv(stride: int, channels: int, part: str, *at: int, kernel: int = k) -> Folded:
        """The convolution `net.part[at]`."""
        layer = lambda m, x: functools.reduce(operator.getitem, at, getattr(m, part))(x, False)  # noqa: E731
        side = 4 * kernel  # large enough for a pixel that meets the whole kernel
        return polyphase.fold(lambda x: net.apply(variables, x, method=layer), kernel, stride, channels, (side, side))

    def trans(i: int) -> Folded:
        # At its true size, because a bounded operator norm holds for one size.
        size = form.at(form.level(i, 1))

        def apply(x: Array) -> Array:
            if net.feedback_norm == "none":
                return jnp.zeros((len(x), *size, net.layers[0]), x.dtype)
            return cast(Array, net.apply(variables, x, method=lambda m, x: m.trans[i](x, False, size)))

        return polyphase.fold(apply, k, 2 if net.stride_layer else 1, net.layers[-1], size, transposed=True)

    channels = [variables["params"]["inject"]["kernel"].shape[2]]
    if net.stem:
        channels = [variables["params"]["stem_layers_0"]["kernel"].shape[2], *net.stem]
    head: tuple[tuple[Folded, ...], ...] = ()
    if net.head == "fused":
        last = net.layers[-1]
        mix = conv(1, last, "mix", kernel=1)
        chains = [[conv(2, last, "head_down", i, h) for h in range(n - 1 - i)] for i in range(n - 1)]
        head = (*((*chain[:-1], _mixed(chain[-1], mix)) for chain in chains), (mix,))
    dense = variables["params"]["classifier"]
    layers = Layers(
        stem=tuple(conv(s, channels[j], "stem_layers", j) for j, s in enumerate(net.stem_strides)),
        inject=conv(1, channels[-1], "inject"),
        trans=tuple(trans(i) for i in range(n)),
        feb=tuple(
            tuple(conv(2 if j + 2 == net.stride_layer else 1, net.layers[j], "feb", i, j) for j in range(depth - 1))
            for i in range(n)
        ),
        down=tuple(
            tuple(tuple(conv(2, width, "down", i, d, h) for h in range(i - d)) for d in range(i)) for i in range(n)
        ),
        head=head,
        classifier=Folded(np.asarray(dense["kernel"]), np.asarray(dense["bias"])),
    )
    return Network(layers, _thresholds(form, variables["params"]), (1,) * n)


def _thresholds(form: Form, params: dict[str, Any]) -> dict[str, Any]:
    """By population: the network's threshold, or what it has learned by channel."""
    found: dict[str, Any] = {}
    for name in form.populations():
        learned = params.get(f"log_threshold_{name.replace('/', '_')}")
        found[name] = form.neuron.threshold if learned is None else np.asarray(form.threshold * np.exp(learned))
    return found


def _mixed(layer: Folded, mix: Folded) -> Folded:
    """A convolution followed by the head's mix, as one. The mix's bias is added once, with the last stream's."""
    return Folded(layer.kernel @ mix.kernel[0, 0], layer.bias @ mix.kernel[0, 0])


def _affine(x: Array, layer: Folded, stride: int = 1) -> Array:
    return conv2d(x, jnp.asarray(layer.kernel, x.dtype), stride) + jnp.asarray(layer.bias, x.dtype)


def encode(form: Form, network: Network, images: Array) -> Array:
    """The transition's input: the images, or the current that the host's stem makes of them."""
    if form.stem_spikes:
        return images
    for layer, stride in zip(network.layers.stem, form.net.stem_strides, strict=True):
        images = dbrelu(_affine(images, layer, stride))
    return _affine(images, network.layers.inject)


def feedback(form: Form, layers: Layers, stream: int, rates: Array) -> Array:
    """The current from a stream's last layer to its first; streams count from 0."""
    layer, stride = layers.trans[stream], 2 if form.net.stride_layer else 1
    back = conv_transpose2d(rates, jnp.asarray(layer.kernel, rates.dtype), stride, form.at(form.level(stream, 1)))
    return back + jnp.asarray(layer.bias, rates.dtype)


def transition(form: Form) -> Callable[..., dict[str, Array]]:
    """The folded network: `transition(network, rates, x, fire) -> rates`.

    The rates are the streams' last layers', and with a spiking head the head's, which nothing feeds back.
    """
    net, neuron, n = form.net, form.neuron, form.net.num_streams
    depth = len(net.layers)

    def step(network: Network, rates: dict[str, Array], x: Array, fire: Any) -> dict[str, Array]:
        layers = network.layers

        def spikes(name: str, current: Array) -> Array:
            threshold = network.thresholds[name]
            return fire(name, current, dataclasses.replace(neuron, threshold=threshold))

        if form.stem_spikes:
            for k, (layer, s) in enumerate(zip(layers.stem, net.stem_strides, strict=True), 1):
                x = spikes(f"stem/layer{k}", _affine(x, layer, s))
            x = _affine(x, layers.inject)
        currents = [feedback(form, layers, i, rates[f"stream{i + 1}"]) for i in range(n)]
        currents[0] = currents[0] + x
        for k in range(1, depth + 1):
            if k == net.fusion_layer and n > 1:
                currents = _fuse(network, currents)
            activity = [spikes(f"stream{i + 1}/layer{k}", c) for i, c in enumerate(currents)]
            if k < depth:
                s = 2 if k + 1 == net.stride_layer else 1
                currents = [_affine(a, layers.feb[i][k - 1], s) for i, a in enumerate(activity)]
        out = {f"stream{i + 1}": a for i, a in enumerate(activity)}
        if form.head_spikes:
            out["head"] = spikes("head", head_current(layers, activity))
        return out

    return step


def _fuse(network: Network, currents: list[Array]) -> list[Array]:
    """The fusion (Eq. 6), before any current was fused."""
    fused = []
    for i, own in enumerate(currents):
        total = own
        for u in range(i + 1, len(currents)):
            total = total + upsample(currents[u], 2 ** (u - i), (own.shape[1], own.shape[2]))
        total = total * network.gains[i]
        for d in range(i):
            lower = currents[d]
            for layer in network.layers.down[i][d]:
                lower = _affine(lower, layer, 2)
            total = total + lower
        fused.append(total)
    return fused


def head_current(layers: Layers, activity: list[Array]) -> Array:
    """What the head's DBReLU is given."""
    total: Any = 0
    for i, (chain, a) in enumerate(zip(layers.head, activity, strict=True)):
        for layer in chain:
            a = _affine(a, layer, 2 if i < len(layers.head) - 1 else 1)
        total = total + a
    return total


def classify(form: Form, network: Network, rates: dict[str, Array]) -> Array:
    """Logits [batch, classes] from the rates."""
    n, layers = form.net.num_streams, network.layers
    if form.head_spikes:
        features = rates["head"]
    elif layers.head:
        features = dbrelu(head_current(layers, [rates[f"stream{i + 1}"] for i in range(n)]))
    else:
        features = rates[f"stream{n}"]
    features = features.reshape(features.shape[0], -1)
    kernel, bias = (jnp.asarray(a, features.dtype) for a in layers.classifier)
    return features @ kernel + bias
