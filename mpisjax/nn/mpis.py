"""The multi-parallel implicit stream network (MPIS), Eq. 6: one definition, read as spikes and as rates."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from mpisjax.errors import UserError
from mpisjax.firing import Fire
from mpisjax.neurons import LIF, GradedIF, Neuron, TernaryIF, dbrelu
from mpisjax.nn.convolution import halved, upsample
from mpisjax.nn.layers import ConvNorm
from mpisjax.nn.spectral import SpectralConvTranspose

Array = jax.Array
Rates = dict[str, Array]


def stream_name(i: int) -> str:
    """The key of stream i (from 1) in a rates pytree."""
    return f"stream{i}"


class MPIS(nn.Module):
    """N parallel implicit streams with a stem before and a classifier after them.

    Stream i works at 1/2^(i-1) of the stem's resolution. With `c_i^k` the current into the neurons of layer k:

        c_i^1 = Trans_i(rates_i) + [i = 1] * Inject(x)
        c_i^k = Conv_i^k(a_i^(k-1))
        at the fusion layer:  c_i <- c_i + sum_{d<i} D_{d,i}(c_d) + sum_{u>i} U_{u,i}(c_u)
        a_i^k = fire("stream{i}/layer{k}", c_i^k);   next rates_i = a_i^L

    Currents are fused, before the neurons: spikes stay binary and both readings keep one fixed point.
    Currents are masked by dropout before they are fused.

    Attributes:
      num_classes: classes.
      stem: channels of the stem's convolutions (conv, BN, DBReLU); may be empty.
      stem_strides: their strides.
      layers: channels of layers 1..L, in every stream.
      num_streams: N >= 1.
      fusion_layer: the layer l at which streams are fused, 1..L.
      stride_layer: the layer, 2..L, that halves the resolution (Trans doubles it back); 0 for none.
      kernel_size: side of every 3x3-like kernel.
      feedback_gain: where the gain of Trans's weight norm starts. Trans has no batch normalisation: dividing by
        the spread of the feedback, which is small, would multiply the Jacobian by its inverse.
      feedback_norm: "weight", each channel of Trans by its weight norm; "spectral", all of it by its operator
        norm, with a gain below 1 (single-stream equilibrium nets, IDE-Net, have this and `num_streams = 1`); or
        "none", no Trans: a feed-forward network, whose equilibrium is one pass. It shows what the feedback is worth.
      head: "fused": the larger streams' rates are brought to the smallest by learned stride-2 convolutions and
        added, then 1x1 conv, BN, DBReLU and a dense layer; "smallest": a dense layer on the smallest stream.
      neurons: the kind of neuron of layers 1..L: "lif" (the network's), "ternary", or "graded" with the largest spike,
        as "graded3"; empty: the network's in all.
      learn_threshold: whether every channel of layers 1..L has a threshold that is trained: `neuron.threshold` times
        the exponential of a parameter, 0 at first. Its gradient comes through the rate; the simulation has the same
        thresholds.
      neuron: the network's neuron, where layers have kinds or thresholds of their own.
      dropout: rate of variational dropout: one mask a sample and channel for the whole solve.
      temporal: input over time: frames [time, batch, h, w, c]. The stem then spikes too, so that memory does not
        grow with time and the rate reading may see the mean frame; static input passes it once, as DBReLU.
      momentum: of the running statistics.
      dtype: of currents and rates, "float32" or "bfloat16" (membrane potentials and parameters stay float32).
      sharding: how currents [batch, h, w, channels] lie on devices, a `NamedSharding` whose mesh has an axis "model"
        for the channels; None leaves it to the compiler.

    Raises:
      UserError: at construction, for impossible settings.
    """

    num_classes: int
    stem: tuple[int, ...] = (16,)
    stem_strides: tuple[int, ...] = (1,)
    layers: tuple[int, ...] = (32, 48)
    num_streams: int = 2
    fusion_layer: int = 2
    stride_layer: int = 2
    kernel_size: int = 3
    feedback_gain: float = 0.5
    feedback_norm: str = "weight"
    head: str = "fused"
    neurons: tuple[str, ...] = ()
    learn_threshold: bool = False
    neuron: LIF | None = None
    dropout: float = 0.0
    temporal: bool = False
    momentum: float = 0.9
    dtype: DTypeLike | None = None
    sharding: NamedSharding | None = None

    def __post_init__(self) -> None:
        depth = len(self.layers)
        if self.num_streams < 1:
            raise UserError(f"model.num_streams is {self.num_streams}: a network needs at least 1 stream.")
        if depth < 1 or min(self.layers) < 1:
            raise UserError(f"model.layers is {tuple(self.layers)}: give at least one layer, of at least 1 channel.")
        if not 1 <= self.fusion_layer <= depth:
            raise UserError(f"model.fusion_layer is {self.fusion_layer}: choose a layer from 1 to {depth}.")
        if self.stride_layer != 0 and not 2 <= self.stride_layer <= depth:
            raise UserError(
                f"model.stride_layer is {self.stride_layer}: choose a layer from 2 to {depth}, or 0 for none."
            )
        if len(self.stem) != len(self.stem_strides):
            raise UserError(
                f"model.stem has {len(self.stem)} layers and model.stem_strides {len(self.stem_strides)}: give each "
                "stem layer one stride."
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size is {self.kernel_size}: set it to an odd number.")
        if self.feedback_norm not in ("weight", "spectral", "none"):
            raise UserError(f"model.feedback_norm is {self.feedback_norm!r}: choose 'weight', 'spectral' or 'none'.")
        if self.feedback_norm == "spectral" and not 0 < self.feedback_gain < 1:
            raise UserError(
                f"model.feedback_gain is {self.feedback_gain}: set it in (0, 1) for model.feedback_norm 'spectral'."
            )
        if self.head not in ("fused", "smallest"):
            raise UserError(f"model.head is {self.head!r}: choose 'fused' or 'smallest'.")
        if self.neurons and len(self.neurons) != depth:
            raise UserError(
                f"model.neurons has {len(self.neurons)} kinds and model.layers {depth} layers: give each layer one, or "
                "none."
            )
        for kind in self.neurons:
            if not re.fullmatch(r"lif|ternary|graded[1-9]\d*", kind):
                raise UserError(f"model.neurons has {kind!r}: choose 'lif', 'ternary' or, say, 'graded3'.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}: set it in [0, 1).")
        super().__post_init__()

    def setup(self) -> None:
        def conv(features: int, **options: Any) -> ConvNorm:
            options = {"kernel_size": self.kernel_size, **options}
            return ConvNorm(features, momentum=self.momentum, dtype=self.dtype, **options)

        n, depth, width = self.num_streams, len(self.layers), self.layers[self.fusion_layer - 1]
        self.stem_layers = [conv(c, stride=s) for c, s in zip(self.stem, self.stem_strides, strict=True)]
        self.inject = conv(self.layers[0])

        def feedback() -> nn.Module:
            stride = 2 if self.stride_layer else 1
            shared: dict[str, Any] = {"stride": stride, "initial_gain": self.feedback_gain}
            if self.feedback_norm == "weight":
                return conv(self.layers[0], transpose=True, batch_norm=False, **shared)
            return SpectralConvTranspose(self.layers[0], self.kernel_size, dtype=self.dtype, **shared)

        self.trans = [feedback() for _ in range(n)] if self.feedback_norm != "none" else []
        self.feb = [
            [conv(self.layers[k - 1], stride=2 if k == self.stride_layer else 1) for k in range(2, depth + 1)]
            for _ in range(n)
        ]
        # D_{d,i}: a chain of i - d stride-2 convolutions.
        self.down = [[[conv(width, stride=2) for _ in range(i - d)] for d in range(i)] for i in range(n)]
        if self.head == "fused":
            self.head_down = [[conv(self.layers[-1], stride=2) for _ in range(n - 1 - i)] for i in range(n - 1)]
            self.mix = conv(self.layers[-1], kernel_size=1)
        self.classifier = nn.Dense(self.num_classes)
        if self.learn_threshold:
            self.log_thresholds = [
                [
                    self.param(f"log_threshold_stream{i + 1}_layer{k}", nn.initializers.zeros, (c,))
                    for k, c in enumerate(self.layers, 1)
                ]
                for i in range(n)
            ]

    def initial_rates(self, images: Array) -> Rates:
        """Zeros of the rates' shapes for a batch [batch, h, w, c] (temporal: [time, batch, h, w, c])."""
        batch, *size = images.shape[1 if self.temporal else 0 :][:3]
        for stride in self.stem_strides:
            size = [-(-n // stride) for n in size]
        dtype = jnp.dtype(self.dtype or jnp.result_type(float))
        halvings = 1 if self.stride_layer else 0
        return {
            stream_name(i + 1): jnp.zeros((batch, *(halved(n, i + halvings) for n in size), self.layers[-1]), dtype)
            for i in range(self.num_streams)
        }

    def encode(self, images: Array, batch_statistics: bool) -> Array:
        """The solve's constant input: the stem's output; temporal input passes as it is (the stem spikes)."""
        if self.temporal:
            return images
        for layer in self.stem_layers:
            images = dbrelu(layer(images, batch_statistics))
        return images

    def transition(self, rates: Rates, x: Array, fire: Fire, batch_statistics: bool) -> Rates:
        """One pass of all streams: the transition that `equilibrium_forward` simulates and solves."""
        if self.temporal:
            for k, layer in enumerate(self.stem_layers, 1):
                x = fire(f"stem/layer{k}", layer(x, batch_statistics))
        currents = []
        for i in range(self.num_streams):
            size, fed_back = (halved(x.shape[1], i), halved(x.shape[2], i)), rates[stream_name(i + 1)]
            if self.trans:
                current = self.trans[i](fed_back, batch_statistics, size)
            else:
                current = jnp.zeros((len(fed_back), *size, self.layers[0]), fed_back.dtype)
            if i == 0:
                current = current + self.inject(x, batch_statistics)
            currents.append(self._dropped(i, 1, current))
        for k in range(1, len(self.layers) + 1):
            if k == self.fusion_layer:
                currents = self._fuse(currents, batch_statistics)
            activity = [fire(f"{stream_name(i + 1)}/layer{k}", c, *self._neuron(i, k)) for i, c in enumerate(currents)]
            if k < len(self.layers):
                currents = [
                    self._dropped(i, k + 1, self.feb[i][k - 1](a, batch_statistics)) for i, a in enumerate(activity)
                ]
        return {stream_name(i + 1): a for i, a in enumerate(activity)}

    def _neuron(self, i: int, k: int) -> tuple[Neuron, ...]:
        """The neuron of stream i + 1's layer k; empty where it is the network's."""
        kind = self.neurons[k - 1] if self.neurons else "lif"
        if kind == "lif" and not self.learn_threshold:
            return ()
        neuron = LIF() if self.neuron is None else self.neuron
        threshold = neuron.threshold
        if self.learn_threshold:
            threshold = threshold * jnp.exp(self.log_thresholds[i][k - 1])
        if kind == "lif":
            return (dataclasses.replace(neuron, threshold=threshold),)
        if kind == "ternary":
            return (TernaryIF(threshold),)
        return (GradedIF(int(kind.removeprefix("graded")), threshold, neuron.initial_potential),)

    def _fuse(self, currents: list[Array], batch_statistics: bool) -> list[Array]:
        fused = []
        for i, current in enumerate(currents):
            total = current
            for d in range(i):
                lower = currents[d]
                for layer in self.down[i][d]:
                    lower = layer(lower, batch_statistics)
                total = total + lower
            for u in range(i + 1, len(currents)):
                total = total + upsample(currents[u], 2 ** (u - i), (current.shape[1], current.shape[2]))
            fused.append(total)
        return fused

    def _dropped(self, i: int, k: int, current: Array) -> Array:
        if self.sharding is not None and current.shape[-1] % self.sharding.mesh.shape["model"] == 0:
            current = jax.lax.with_sharding_constraint(current, self.sharding)
        name = mask_name(i + 1, k)
        if not self.has_variable("masks", name):
            return current
        return current * self.get_variable("masks", name).astype(current.dtype)

    def classify(self, rates: Rates, batch_statistics: bool) -> Array:
        """Equilibrium rates -> logits [batch, num_classes], float32 or wider."""
        features = rates[stream_name(self.num_streams)]
        if self.head == "fused":
            for i, chain in enumerate(self.head_down):
                larger = rates[stream_name(i + 1)]
                for layer in chain:
                    larger = layer(larger, batch_statistics)
                features = features + larger
            features = dbrelu(self.mix(features, batch_statistics))
        features = features.reshape(features.shape[0], -1)
        return self.classifier(features.astype(jnp.promote_types(features.dtype, jnp.float32)))

    def __call__(self, images: Array, fire: Fire) -> Array:
        """Touches every parameter once; used to initialise them."""
        x = self.encode(images, True)
        rates = self.transition(self.initial_rates(images), x[0] if self.temporal else x, fire, True)
        return self.classify(rates, True)


def mask_name(i: int, k: int) -> str:
    """The key of stream i's layer k in the collection of dropout masks."""
    return f"{stream_name(i)}_layer{k}"


def sample_masks(net: MPIS, rng: Array, batch: int) -> dict[str, Array]:
    """Variational dropout's masks for one forward pass.

    One Bernoulli draw a sample and channel, divided by the keep rate, the same at every time step and place,
    in the simulation, in f and in J.

    Returns:
      The variable collection "masks": float [batch, 1, 1, channels] by layer; empty without dropout.
    """
    if not net.dropout:
        return {}
    keep, masks = 1 - net.dropout, {}
    names = [(i, k) for i in range(1, net.num_streams + 1) for k in range(1, len(net.layers) + 1)]
    for (i, k), key in zip(names, jax.random.split(rng, len(names)), strict=True):
        kept = jax.random.bernoulli(key, keep, (batch, 1, 1, net.layers[k - 1]))
        masks[mask_name(i, k)] = kept.astype(jnp.result_type(float)) / keep
    return masks
