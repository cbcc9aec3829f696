"""What a network computes: synaptic operations of its spikes, multiply-accumulates of the rest, energy,
traffic.

A synaptic operation (SynOp) is one spike reaching one synapse: an addition. Everything that is not driven by
spikes is counted as multiply-accumulates (MACs): the stem and the injection (once a sample, since their input
is constant; event input drives them every step), the head (once), and the fusion's stride-2 convolutions,
which act on currents, in every step. Synapses that padding cuts off are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.nn.convolution import conv2d, conv_transpose2d, halved
from mpisjax.nn.mpis import MPIS, stream_name

Size = tuple[int, int]

# Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: 45 nm, 0.9 V, 32-bit
# floating point; in pJ. A 64-bit read of a 1 MB SRAM costs 100 pJ, so 32 bits 50.
ADD_PJ, MULTIPLY_PJ, SRAM_PJ = 0.9, 3.7, 50.0
MAC_PJ = ADD_PJ + MULTIPLY_PJ
CONSTANTS = (
    "Horowitz, ISSCC 2014, 45 nm, 32-bit floating point: addition 0.9 pJ, multiply-accumulate 4.6 pJ, 32-bit "
    "access to a 1 MB SRAM 50 pJ (half of a 64-bit one). Memory traffic assumes no reuse, an upper bound: a "
    "synaptic operation reads a weight and reads and writes a membrane potential; a multiply-accumulate reads a "
    "weight and an activity; an update of a neuron reads and writes its potential."
)


class Synapses(NamedTuple):
    """One convolution, as its inputs see it.

    Attributes:
        name: The layer's name.
        source: The population whose spikes drive it; None if its input is not spikes.
        fan_out: float [h, w], synapses that leave a neuron at a place.
        channels: Of the input, so that a dense pass costs `channels * fan_out.sum()` MACs.
        every_step: Whether it runs at every time step (False: once a sample).
    """

    name: str
    source: str | None
    fan_out: np.ndarray
    channels: int
    every_step: bool

    @property
    def macs(self) -> float:
        """Multiply-accumulates of one dense pass, for one sample."""
        return float(self.channels * self.fan_out.sum())


class Cost(NamedTuple):
    """What one sample costs; means over samples.

    Attributes:
        synops: Synaptic operations by layer.
        macs: Multiply-accumulates by layer.
        additions: Of currents (fusion and injection), over all steps.
        updates: Of neurons, over all steps: an addition each, and a multiplication where there is a leak.
        compute_uj: Energy of arithmetic, in microjoules.
        memory_uj: Energy of memory traffic, in microjoules.
    """

    synops: dict[str, float]
    macs: dict[str, float]
    additions: float
    updates: float
    compute_uj: float
    memory_uj: float


def _fan_out(size: Size, kernel: int, stride: int, features: int, transpose_to: Size | None = None) -> np.ndarray:
    ones = jnp.ones((kernel, kernel, 1, 1))
    if transpose_to is not None:
        reached = conv2d(jnp.ones((1, *transpose_to, 1)), ones, stride)
    else:
        outputs = jnp.ones((1, -(-size[0] // stride), -(-size[1] // stride), 1))
        reached = conv_transpose2d(outputs, ones, stride, size)
    return np.asarray(reached[0, :, :, 0], np.float64) * features


def synapses(net: MPIS, image_shape: tuple[int, int, int]) -> list[Synapses]:
    """Every convolution of a network, and its classifier.

    Args:
        net: The network.
        image_shape: Height, width, channels.
    """
    k, layers, depth = net.kernel_size, net.layers, len(net.layers)
    width = layers[net.fusion_layer - 1]
    found: list[Synapses] = []
    size, channels, source = image_shape[:2], image_shape[2], None
    for n, (features, stride) in enumerate(zip(net.stem, net.stem_strides, strict=True), 1):
        fan_out = _fan_out(size, k, stride, features)
        found.append(Synapses(f"stem/conv{n}", source, fan_out, channels, net.temporal))
        size, channels = (
            (halved(size[0]) if stride == 2 else size[0], halved(size[1]) if stride == 2 else size[1]),
            features,
        )
        source = f"stem/layer{n}" if net.temporal else None
    found.append(Synapses("inject", source, _fan_out(size, k, 1, layers[0]), channels, net.temporal))
    last: list[Size] = []
    for i in range(net.num_streams):
        stream, here = stream_name(i + 1), (halved(size[0], i), halved(size[1], i))
        first = here
        for n in range(1, depth + 1):
            if n > 1:
                stride = 2 if n == net.stride_layer else 1
                name, fan_out = f"{stream}/conv{n}", _fan_out(here, k, stride, layers[n - 1])
                found.append(Synapses(name, f"{stream}/layer{n - 1}", fan_out, layers[n - 2], True))
                here = (halved(here[0]), halved(here[1])) if stride == 2 else here
            if n == net.fusion_layer:
                for target in range(i + 1, net.num_streams):
                    for hop in range(target - i):
                        lower = (halved(here[0], hop), halved(here[1], hop))
                        name = f"fusion/{stream}-{stream_name(target + 1)}/conv{hop + 1}"
                        found.append(Synapses(name, None, _fan_out(lower, k, 2, width), width, True))
        if net.feedback_norm != "none":
            stride = 2 if net.stride_layer else 1
            fan_out = _fan_out(here, k, stride, layers[0], transpose_to=first)
            found.append(Synapses(f"{stream}/trans", f"{stream}/layer{depth}", fan_out, layers[-1], True))
        last.append(here)
    head = last[-1]
    if net.head == "fused":
        for i in range(net.num_streams - 1):
            for hop in range(net.num_streams - 1 - i):
                lower = (halved(last[i][0], hop), halved(last[i][1], hop))
                name = f"head/{stream_name(i + 1)}/conv{hop + 1}"
                found.append(Synapses(name, None, _fan_out(lower, k, 2, layers[-1]), layers[-1], False))
        found.append(Synapses("head/mix", None, _fan_out(head, 1, 1, layers[-1]), layers[-1], False))
    found.append(Synapses("head/classifier", None, np.full(head, float(net.num_classes)), layers[-1], False))
    return found


def additions_per_step(net: MPIS, shapes: dict[str, tuple[int, ...]]) -> float:
    """Additions of whole currents in one step of one sample: fusion, and the injection into stream 1.

    Args:
        net: The network.
        shapes: Of every population, without the batch axis.
    """
    fused = [shapes[f"{stream_name(i + 1)}/layer{net.fusion_layer}"] for i in range(net.num_streams)]
    return sum(float(np.prod(s)) * (net.num_streams - 1) for s in fused) + float(np.prod(shapes["stream1/layer1"]))


def synops(links: list[Synapses], spike_counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Synaptic operations by layer and sample.

    Args:
        links: What `synapses` gave.
        spike_counts: Of every population, [batch, h, w, channels], summed over time.

    Returns:
        float [batch] by layer that spikes drive.
    """
    return {
        link.name: jnp.einsum("bhwc,hw->b", spike_counts[link.source].astype(jnp.float32), jnp.asarray(link.fan_out))
        for link in links
        if link.source is not None
    }


def cost(
    links: list[Synapses],
    synops: dict[str, float],
    *,
    num_steps: float,
    neurons: int,
    additions: float,
    leak: float,
) -> Cost:
    """Adds it all up for one sample.

    Args:
        links: What `synapses` gave.
        synops: By layer, of a sample over all steps.
        num_steps: Time steps.
        neurons: Spiking neurons.
        additions: What `additions_per_step` gave.
        leak: Of the neurons; a leak below 1 costs a multiplication an update.
    """
    macs = {s.name: s.macs * (num_steps if s.every_step else 1) for s in links if s.source is None}
    updates, added = neurons * num_steps, additions * num_steps
    events, products = sum(synops.values()), sum(macs.values())
    compute = ADD_PJ * (events + added + updates) + MAC_PJ * products + (MULTIPLY_PJ * updates if leak < 1 else 0)
    memory = SRAM_PJ * (3 * events + 2 * products + 2 * updates)
    return Cost(synops, macs, added, updates, compute * 1e-6, memory * 1e-6)


def dense_cost(links: list[Synapses], evaluations: float) -> Cost:
    """The same network solved as rates, every convolution dense: `evaluations` of f, stem and head once.

    Args:
        links: What `synapses` gave.
        evaluations: Of the equivalent map.
    """
    once = {"inject"} | {s.name for s in links if s.name.startswith(("stem/", "head/"))}
    macs = {s.name: s.macs * (1 if s.name in once else evaluations) for s in links}
    total = sum(macs.values())
    return Cost({}, macs, 0.0, 0.0, MAC_PJ * total * 1e-6, 2 * SRAM_PJ * total * 1e-6)
