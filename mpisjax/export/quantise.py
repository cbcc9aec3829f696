"""Integer weights of 8 or 4 bits, with thresholds scaled to integers: the simulation is then integer arithmetic.

Every layer's output channel has a scale of its own, symmetric around 0: a weight is `q * gain` units of current, with
q an integer of the given bits and the gain a positive integer. A threshold is `UNITS` units; biases are whole units.
Where currents are convolved once more (the fusion), the units are `RELAY` times finer, so that those weights are
integers too. Nothing is rounded while the network runs, so the rate reading and the spikes still share one fixed point.

Gains are calibrated on training images: each is the one with the smallest squared error of the current, given how
strongly each input channel fires, and a bias takes up what the rounding of its weights moves on average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export import folded
from mpisjax.export.folded import Form, Layers, Network
from mpisjax.export.polyphase import Folded
from mpisjax.simulate import SpikeForward, simulate

Array = jax.Array
BITS = {"float32": 32, "int8": 8, "int4": 4}  # of a weight
UNITS = 2**12  # of current in a threshold
RELAY = 2**8  # how much finer the units are where currents are convolved
SHRINK = np.linspace(1.0, 0.4, 25)  # of the largest weight: the candidates for the largest that is kept


class Moments(NamedTuple):
    """What a layer's input is like on the calibration images, by channel (of the classifier: by feature)."""

    mean: np.ndarray
    square: np.ndarray


def check(form: Form) -> None:
    """Refuses what integers cannot hold.

    Raises:
        UserError: The neurons leak, or there are more than two streams.
    """
    if form.neuron.leak != 1:
        raise UserError(
            f"neuron.leak is {form.neuron.leak}, and a leak rounds integers: export with --weights float32."
        )
    if form.net.num_streams > 2:
        raise UserError(
            f"model.num_streams is {form.net.num_streams}: integer weights are for one or two streams; export with "
            "--weights float32."
        )


def each(fn: Callable[..., Any], layers: Layers, *others: Layers) -> Layers:
    """`fn(part, layer, *others)` for every layer, with the part's name."""
    is_layer = lambda a: isinstance(a, Folded)  # noqa: E731
    mapped = (
        jax.tree.map(
            functools.partial(fn, part), getattr(layers, part), *(getattr(o, part) for o in others),
            is_leaf=is_layer,
        )
        for part in Layers._fields
    )  # fmt: skip
    return Layers(*mapped)


def pixel_network(form: Form, network: Network, mean: Any, std: Any) -> tuple[Network, np.ndarray]:
    """The network that reads `pixels - offset` in place of `(pixels / 255 - mean) / std`; and the offset."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    offset = np.rint(255 * mean)
    rest = (offset - 255 * mean) / (255 * std)

    def read_pixels(first: Folded) -> Folded:
        bias = first.bias + np.einsum("hwio,i->o", first.kernel, rest)
        return Folded(first.kernel / (255 * std)[:, None], bias)

    return network._replace(layers=of_first(form, network.layers, read_pixels)), offset.astype(np.int64)


def of_first(form: Form, layers: Layers, fn: Callable[[Folded], Folded]) -> Layers:
    """The layers with `fn` of the one that reads the image in its place, where that one is in the graph."""
    if not form.stem_spikes:
        return layers
    if layers.stem:
        return layers._replace(stem=(fn(layers.stem[0]), *layers.stem[1:]))
    return layers._replace(inject=fn(layers.inject))


def moments(form: Form, network: Network, x: Array, num_steps: int) -> Layers:
    """The inputs of every layer while the network runs on calibration images."""
    net, layers = form.net, network.layers
    batch = x.shape[1 if net.temporal else 0]

    @jax.jit
    def run(network: Network, x: Array) -> dict[str, Array]:
        return simulate(
            folded.transition(form), network, x, form.initial_rates(batch), neuron=form.neuron, record=True,
            forward=SpikeForward(None if net.temporal else num_steps), time_axis=0 if net.temporal else None,
        ).layer_rates  # fmt: skip

    rates = run(network, x)
    depth, n, fused = len(net.layers), net.num_streams, net.fusion_layer

    def of(a: Any) -> Moments:
        rows = np.asarray(a).reshape(-1, a.shape[-1])
        return Moments(rows.mean(0), np.square(rows).mean(0))

    image = x.mean(0) if net.temporal else x
    stem = [image, *(rates[f"stem/layer{k}"] for k in range(1, len(net.stem) + 1))] if form.stem_spikes else []

    def current(d: int) -> Array:
        """The current of stream d that is relayed at the fusion."""
        if fused > 1:
            stride = 2 if fused == net.stride_layer else 1
            return folded._affine(rates[f"stream{d + 1}/layer{fused - 1}"], layers.feb[d][fused - 2], stride)
        back = folded.feedback(form, layers, d, rates[f"stream{d + 1}/layer{depth}"])
        if d:
            return back
        return back + (folded._affine(stem[-1], layers.inject) if form.stem_spikes else x)

    last = [rates[f"stream{i + 1}/layer{depth}"] for i in range(n)]
    features = rates["head"] if form.head_spikes else last[-1]
    flat = np.asarray(features).reshape(len(features), -1)
    nothing = Moments(np.zeros(1), np.ones(1))
    found: dict[str, Any] = {
        "stem": tuple(map(of, stem[:-1])) if form.stem_spikes else (nothing,) * len(layers.stem),
        "inject": of(stem[-1]) if form.stem_spikes else nothing,
        "trans": tuple(map(of, last)),
        "feb": tuple(tuple(of(rates[f"stream{i + 1}/layer{k}"]) for k in range(1, depth)) for i in range(n)),
        "down": tuple(tuple((of(current(d)),) for d in range(i)) for i in range(n)),
        "head": tuple((of(a),) for a in last) if layers.head else (),
        "classifier": Moments(flat.mean(0), np.square(flat).mean(0)),
    }
    return Layers(**found)


def gains(form: Form, layers: Layers, seen: Layers, bits: int) -> Layers:
    """Every layer's gain by output channel, integers; of the classifier one for all, in float."""
    largest = 2 ** (bits - 1) - 1

    def choose(part: str, layer: Folded, inputs: Moments) -> np.ndarray:
        w = _rows(part, layer.kernel)
        top = np.maximum(np.abs(w).max((0, 1)), 1e-12)
        top = np.full_like(top, top.max()) if part == "classifier" else top
        unit = _unit(form, part)
        found = np.maximum(SHRINK[:, None] * top / largest / unit, 1e-9)
        found = found if part == "classifier" else np.unique(np.maximum(np.rint(found), 1), axis=0)
        square = inputs.square[None, :, None] if inputs.square.size == w.shape[1] else 1.0
        errors = []
        for gain in found:
            step = gain * unit
            q = np.clip(np.rint(w / step), -largest, largest)
            errors.append((np.square(q * step - w) * square).sum((0, 1)))
        error = np.stack(errors)
        if part == "classifier":
            return found[error.sum(1).argmin()]
        return np.take_along_axis(found, error.argmin(0)[None], 0)[0]

    return each(choose, layers, seen)


def rounded(form: Form, layers: Layers, gain: Layers, bits: int, straight_through: bool = False) -> Layers:
    """The layers with every weight on its integers, still in thresholds. Biases stay.

    Args:
        form: Which parts are neurons.
        layers: In float.
        gain: What `gains` gave.
        bits: Of a weight.
        straight_through: The derivative is that of the layers themselves, for fine-tuning.
    """
    largest = 2 ** (bits - 1) - 1

    def to_grid(part: str, layer: Folded, gain: Any) -> Folded:
        if not _in_graph(form, part):
            return layer
        kernel = jnp.asarray(layer.kernel)
        step = jnp.asarray(_along(part, np.asarray(gain) * _unit(form, part)), kernel.dtype)
        found: Any = jnp.clip(jnp.round(kernel / step), -largest, largest) * step
        if straight_through:
            found = kernel + jax.lax.stop_gradient(found - kernel)
        return Folded(found, layer.bias)

    return each(to_grid, layers, gain)


def corrected(form: Form, layers: Layers, grid: Layers, seen: Layers) -> Layers:
    """The rounded layers, with biases that take up what rounding moved on average."""

    def correct(part: str, layer: Folded, new: Folded, inputs: Moments) -> Folded:
        if not _in_graph(form, part):
            return layer
        moved = _rows(part, np.asarray(new.kernel)) - _rows(part, np.asarray(layer.kernel))
        return Folded(new.kernel, layer.bias - np.einsum("kio,i->o", moved, inputs.mean))

    return each(correct, layers, grid, seen)


def integers(form: Form, network: Network, gain: Layers, bits: int) -> Network:
    """The network in integers: kernels `q * gain`, biases and thresholds in units."""
    largest = 2 ** (bits - 1) - 1

    def to_units(part: str, layer: Folded, gain: Any) -> Folded:
        if not _in_graph(form, part):
            return layer
        unit, gain = _unit(form, part), np.asarray(gain)
        q = np.rint(np.asarray(layer.kernel, np.float64) / _along(part, gain * unit))
        q = np.clip(q, -largest, largest)
        if part == "classifier":
            return Folded((q * RELAY).astype(np.int32), np.rint(layer.bias / (gain * unit) * RELAY).astype(np.int32))
        out = form.threshold / (UNITS * RELAY if part == "down" else UNITS)
        kernel, bias = q * _along(part, gain), np.rint(np.asarray(layer.bias, np.float64) / out)
        return Folded(kernel.astype(np.int32), bias.astype(np.int32))

    down = network.layers.down
    relayed = tuple(RELAY if any(down[i]) else 1 for i in range(form.net.num_streams))
    width = form.net.layers[form.net.fusion_layer - 1]
    thresholds = {}
    for name in network.thresholds:
        stream, _, layer = name.partition("/layer")
        fused = stream.startswith("stream") and int(layer) == form.net.fusion_layer
        units = UNITS * (relayed[int(stream.removeprefix("stream")) - 1] if fused else 1)
        # Even, so that half a threshold is whole.
        own = 2 * np.rint(units / 2 * np.asarray(network.thresholds[name], np.float64) / form.threshold)
        thresholds[name] = own.astype(np.int32) if own.ndim else int(own)
    return Network(
        each(to_units, network.layers, gain),
        thresholds,
        tuple(np.full(width, g, np.int32) if g > 1 else 1 for g in relayed),
    )


def _in_graph(form: Form, part: str) -> bool:
    if part in ("stem", "inject"):
        return form.stem_spikes
    return part not in ("head", "classifier") or form.head_spikes or form.net.head == "smallest"


def _unit(form: Form, part: str) -> float:
    """A gain of 1, in thresholds; at the fusion, of a current by a current."""
    if part == "classifier":
        return 1.0
    return 1 / RELAY if part == "down" else form.threshold / UNITS


def _along(part: str, gain: np.ndarray) -> np.ndarray:
    """A gain by output channel, to multiply a kernel with."""
    return gain[..., None] if part == "trans" else gain


def _rows(part: str, kernel: np.ndarray) -> np.ndarray:
    """A kernel as [taps, in, out]."""
    kernel = kernel.swapaxes(2, 3) if part == "trans" else kernel
    return kernel.reshape(-1, *kernel.shape[-2:])


def quantise(
    form: Form,
    network: Network,
    x: Array,
    bits: int,
    num_steps: int,
    tune: Callable[[Layers, Layers], Layers] = lambda layers, gain: layers,
) -> Network:
    """Integer weights, calibrated.

    Args:
        form: Which parts are neurons.
        network: In float; with a spiking stem, what `pixel_network` gave.
        x: Training images as the network reads them (`folded.encode`); 64 to 512 are enough.
        bits: Of a weight, 4 or 8.
        num_steps: Time steps of the calibration.
        tune: `tune(layers, gain)` trains the layers before they are rounded (`mpisjax.export.finetune`).
    """
    seen = moments(form, network, x, num_steps)
    gain = gains(form, network.layers, seen, bits)
    grid = rounded(form, network.layers, gain, bits)
    layers = corrected(form, network.layers, grid, seen)
    return integers(form, network._replace(layers=tune(layers, gain)), gain, bits)
