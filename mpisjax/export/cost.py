"""What an exported network would cost on a neuromorphic chip: an estimate from published figures.

The chip is Intel's Loihi 2: 128 neuron cores of 8,192 neurons, and 120 million synapses a chip (WikiChip, "Loihi 2 -
Intel"); 192 KB of memory a core, partitioned as needed (press report of the announcement, "Intel Reveals 4nm Loihi 2
Neuromorphic Research Chip", October 2021). Intel's own technology brief of 2021 was not at hand. How a compiler would
place a network depends on more than that, so cores are counted by memory and by neurons alone. Convolutions share
weights; where a placement cannot, `synapses` says how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

from mpisjax.export.folded import Form

BITS = {"float32": 32, "int8": 8, "int4": 4}
CORES = 128
NEURONS_PER_CORE = 8192
BYTES_PER_CORE = 192 * 1024
SYNAPSES_PER_CHIP = 120_000_000
POTENTIAL_BYTES = 4  # a potential of at most 32 bits


class Projection(NamedTuple):
    """One convolution between two populations.

    Attributes:
        source: The population whose spikes come in; "" for the image.
        weights: Shared weights.
        synapses: Connections, each tap of each output pixel.
        fan_out: Connections of one neuron of the source, on average.
    """

    source: str
    weights: int
    synapses: int
    fan_out: float


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


def projections(form: Form) -> list[Projection]:
    """All convolutions; those of currents count with the population that the current comes from as their source."""
    net, k, depth = form.net, form.net.kernel_size, len(form.net.layers)
    sizes, found = _sizes(form), []

    def add(source: str, channels: int, out: tuple[int, int, int], kernel: int, shrink: float = 1.0) -> None:
        height, width, features = out
        synapses = int(height * width * features * channels * kernel**2 * shrink)
        neurons = sizes.get(source, (1, 1, 1))
        count = neurons[0] * neurons[1] * neurons[2]
        found.append(Projection(source, kernel**2 * channels * features, synapses, synapses / count))

    source, channels = "", 0
    if form.stem_spikes:
        for number in range(1, len(net.stem) + 1):
            if number > 1:
                add(source, channels, sizes[f"stem/layer{number}"], k)
            source, channels = f"stem/layer{number}", net.stem[number - 1]
        if source:
            add(source, channels, sizes["stream1/layer1"], k)
    quarter = 0.25 if net.stride_layer else 1.0  # a transposed convolution of stride 2 meets a quarter of its taps
    for i in range(net.num_streams):
        last, first = f"stream{i + 1}/layer{depth}", sizes[f"stream{i + 1}/layer1"]
        add(last, net.layers[-1], first, k, quarter)
        for number in range(2, depth + 1):
            below = f"stream{i + 1}/layer{number - 1}"
            add(below, net.layers[number - 2], sizes[f"stream{i + 1}/layer{number}"], k)
        if form.head_spikes:
            add(last, net.layers[-1], sizes["head"], k if i < net.num_streams - 1 else 1)
    return found


def estimate(form: Form, weights: str, spikes: dict[str, float], num_steps: int) -> Cost:
    """The cost of one image.

    Args:
        form: Which parts are neurons.
        weights: "float32", "int8" or "int4".
        spikes: Of one image, by population, summed over the steps.
        num_steps: Time steps: relays pass a graded current in each.
    """
    net, sizes, found = form.net, _sizes(form), projections(form)
    count = {name: h * w * c for name, (h, w, c) in sizes.items()}
    relays, relayed, relay_weights = 0, 0, 0
    if net.num_streams > 1:
        for i in range(net.num_streams):
            height, width, channels = sizes[f"stream{i + 1}/layer{net.fusion_layer}"]
            relays += height * width * channels
            for d in range(i):  # D of the larger streams, and U of the smaller ones, of which each copies
                relayed += height * width * channels * channels * net.kernel_size**2
                relay_weights += (i - d) * net.kernel_size**2 * channels**2
            relayed += (net.num_streams - 1 - i) * height * width * channels
    neurons = sum(count.values()) + relays
    classes = net.num_classes * count["head"] if form.head_spikes else 0
    weight_count = sum(p.weights for p in found) + relay_weights + classes
    synops = sum(spikes.get(p.source.replace("/", "_"), 0.0) * p.fan_out for p in found)
    synops += relayed * num_steps + spikes.get("head", 0.0) * net.num_classes
    weight_bytes, potential_bytes = weight_count * BITS[weights] // 8, neurons * POTENTIAL_BYTES
    by_memory = -(-(weight_bytes + potential_bytes) // BYTES_PER_CORE)
    return Cost(
        neurons, sum(p.synapses for p in found) + relayed + classes, weight_bytes, potential_bytes, synops,
        max(by_memory, -(-neurons // NEURONS_PER_CORE)),
    )  # fmt: skip


def report(form: Form, weights: str, spikes: dict[str, float], num_steps: int) -> list[str]:
    """The estimate, in lines."""
    cost = estimate(form, weights, spikes, num_steps)
    return [
        "estimate for Loihi 2, from published figures; nothing was run on a chip:",
        f"  {cost.neurons:,} neurons, {cost.synapses:,} synapses ({cost.synapses / SYNAPSES_PER_CHIP:.1%} of a chip's "
        f"120 million, if none shares a weight)",
        f"  {cost.weight_bytes:,} bytes of shared weights ({weights}), {cost.potential_bytes:,} bytes of potentials",
        f"  at least {cost.cores} of {CORES} cores, by 8,192 neurons and 192 KB a core",
        f"  {cost.synops:,.0f} synaptic operations for an image in {num_steps} steps",
    ]


def _sizes(form: Form) -> dict[str, tuple[int, int, int]]:
    """Height, width and channels by population."""
    found, (height, width) = {}, form.size
    for k, stride in enumerate(form.net.stem_strides, 1):
        height, width = -(-height // stride), -(-width // stride)
        found[f"stem/layer{k}"] = (height, width)
    last = form.net.num_streams - 1
    channels = form.populations()
    for i in range(form.net.num_streams):
        for k in range(1, len(form.net.layers) + 1):
            found[f"stream{i + 1}/layer{k}"] = form.at(form.level(i, k))
    found["head"] = form.at(form.level(last, len(form.net.layers)))
    return {name: (*size, channels[name]) for name, size in found.items() if name in channels}
