"""Populations of neurons in a NIR graph: single IF and LIF nodes, or the four nodes that reset by subtraction."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mpisjax.errors import UserError
from mpisjax.neurons import LIF


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


def find(graph: Any, reset: str) -> dict[str, Population]:
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
    (reset, before), leak_gain = resets[0], _leak_and_gain(name, node)
    leak, gain = leak_gain
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
