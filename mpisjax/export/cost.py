"""What an exported network would cost on a neuromorphic chip: an estimate from published figures.

The chip is Intel's Loihi 2: 128 neuron cores of 8,192 neurons, and 120 million synapses a chip (WikiChip, "Loihi 2 -
Intel"); 192 KB of memory a core, partitioned as needed (press report of the announcement, "Intel Reveals 4nm Loihi 2
Neuromorphic Research Chip", October 2021). Intel's own technology brief of 2021 was not at hand. How a compiler would
place a network depends on more than that, so cores are counted by memory and by neurons alone. Convolutions share
weights; where a placement cannot, `synapses` says how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from mpisjax.export import quantise
from mpisjax.export.folded import Form, Network
from mpisjax.export.polyphase import Folded

CORES = 128
NEURONS_PER_CORE = 8192
BYTES_PER_CORE = 192 * 1024
SYNAPSES_PER_CHIP = 120_000_000
POTENTIAL_BYTES = 4  # a potential of at most 32 bits


class Cost(NamedTuple):
    """An estimate for one network.

    Attributes:
        neurons: Spiking neurons, and the relays that add up currents at the fusion.
        synapses: Connections if no weight is shared.
        weight_bytes: Shared weights, in their bits.
        potential_bytes: One potential a neuron.
        synops: Synaptic operations for one image: each spike, once for every synapse that it meets.
        cores: At least so many, by neurons and by memory.
    """

    neurons: int
    synapses: int
    weight_bytes: int
    potential_bytes: int
    synops: float
    cores: int


def projections(form: Form, network: Network) -> Iterator[tuple[str, str, Folded, float]]:
    """The convolutions between populations: source, target, layer, and the share of the taps that meet a pixel.

    Those of currents count with the population that the current comes from as their source.
    """
    layers, streams = network.layers, range(1, form.net.num_streams + 1)
    stem = [f"stem/layer{k}" for k in range(1, len(layers.stem) + 1)] if form.stem_spikes else []
    for source, target, layer in zip(
        stem, [*stem[1:], "stream1/layer1"], [*layers.stem[1:], layers.inject], strict=False
    ):
        yield source, target, layer, 1.0
    quarter = 0.25 if form.net.stride_layer else 1.0  # a transposed convolution of stride 2 meets a quarter of its taps
    for i, trans, feb in zip(streams, layers.trans, layers.feb, strict=True):
        names = [f"stream{i}/layer{k}" for k in range(1, len(form.net.layers) + 1)]
        yield names[-1], names[0], trans, quarter
        for source, target, layer in zip(names, names[1:], feb, strict=False):
            yield source, target, layer, 1.0
        if form.head_spikes:
            yield names[-1], "head", layers.head[i - 1][-1], 1.0


def estimate(form: Form, network: Network, weights: str, spikes: dict[str, float], num_steps: int) -> Cost:
    """The cost of one image.

    Args:
        form: Which parts are neurons.
        network: What `fold_network` gave.
        weights: "float32", "int8" or "int4".
        spikes: Of one image, by population, summed over the steps.
        num_steps: Time steps: relays pass a graded current in each.
    """
    net, sizes = form.net, form.populations()
    count = {name: math.prod(size) for name, size in sizes.items()}
    neurons, synapses, weight_count, synops = sum(count.values()), 0, 0, 0.0
    for source, target, layer, share in projections(form, network):
        connections = int(math.prod(sizes[target][:2]) * layer.kernel.size * share)
        synapses += connections
        weight_count += layer.kernel.size
        synops += spikes.get(source.replace("/", "_"), 0.0) * connections / count[source]
    if net.num_streams > 1:
        for i, chains in enumerate(network.layers.down):
            height, width, channels = sizes[f"stream{i + 1}/layer{net.fusion_layer}"]
            # D of the larger streams, and U of the smaller ones, of which each copies.
            relayed = sum(height * width * chain[-1].kernel.size for chain in chains)
            relayed += (net.num_streams - 1 - i) * height * width * channels
            neurons += height * width * channels
            synapses += relayed
            synops += relayed * num_steps
            weight_count += sum(layer.kernel.size for chain in chains for layer in chain)
    if form.head_spikes:
        classes = network.layers.classifier.kernel.size
        synapses += classes
        weight_count += classes
        synops += spikes.get("head", 0.0) * net.num_classes
    weight_bytes, potential_bytes = weight_count * quantise.BITS[weights] // 8, neurons * POTENTIAL_BYTES
    by_memory = -(-(weight_bytes + potential_bytes) // BYTES_PER_CORE)
    cores = max(by_memory, -(-neurons // NEURONS_PER_CORE))
    return Cost(neurons, synapses, weight_bytes, potential_bytes, synops, cores)


def report(form: Form, network: Network, weights: str, spikes: dict[str, float], num_steps: int) -> list[str]:
    """The estimate, in lines."""
    cost = estimate(form, network, weights, spikes, num_steps)
    return [
        "estimate for Loihi 2, from published figures; nothing was run on a chip:",
        f"  {cost.neurons:,} neurons, {cost.synapses:,} synapses ({cost.synapses / SYNAPSES_PER_CHIP:.1%} of a chip's "
        f"120 million, if none shares a weight)",
        f"  {cost.weight_bytes:,} bytes of shared weights ({weights}), {cost.potential_bytes:,} bytes of potentials",
        f"  at least {cost.cores} of {CORES} cores, by 8,192 neurons and 192 KB a core",
        f"  {cost.synops:,.0f} synaptic operations for an image in {num_steps} steps",
    ]
