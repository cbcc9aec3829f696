"""Runs an exported graph of IF nodes with Spyx's neurons and Flax's layers: what a user of Spyx would write.

It imports nothing of mpisjax. Spyx's own importer walks one chain of nodes, without fusion and feedback, so the graph
is stepped here. Its neurons compare the potential before a current is added: they are given the current beforehand.
"""

from __future__ import annotations

import graphlib
from typing import Any

import jax
import jax.numpy as jnp
import nir
import numpy as np
import spyx
from flax import nnx


def run(graph: Any, x: np.ndarray, num_steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores [batch, classes] and spikes by population, [batch], from the graph's input."""
    kinds: dict[str, list[str]] = {}
    for name, node in graph.nodes.items():
        kinds.setdefault(type(node).__name__, []).append(name)
    modules = {name: layer(graph.nodes[name]) for name in kinds["Conv2d"]}
    modules |= {name: neurons(graph.nodes[name]) for name in kinds["IF"]}
    delays = kinds.get("Delay", [])
    sources = {name: [s for s, to in graph.edges if to == name] for name in graph.nodes}
    order = list(graphlib.TopologicalSorter(
        {name: [s for s in sources[name] if s not in delays] for name in graph.nodes if name not in delays}
    ).static_order())  # fmt: skip
    image = jnp.moveaxis(jnp.asarray(x, jnp.result_type(float)), 1, -1)

    def step(state: Any, _: Any) -> Any:
        values, state = dict(state["before"]), dict(state)
        for name in order:
            given = sum(values[s] for s in sources[name]) if sources[name] else image
            node = graph.nodes[name]
            if isinstance(node, nir.IF):
                spikes, state[name] = modules[name](jnp.zeros_like(given), state[name] + given)
                values[name] = spikes
            elif isinstance(node, nir.Conv2d):
                values[name] = modules[name](given)
            else:
                values[name] = given * channels_last(node.scale) if isinstance(node, nir.Scale) else given
        state["before"] = {name: values[sources[name][0]] for name in delays}
        counts = {name: values[name].reshape(len(x), -1).sum(1) for name in kinds["IF"]}
        return state, (values["output"].reshape(len(x), -1), counts)

    state = {name: jnp.broadcast_to(start(graph.nodes[name]), modules[name].initial_state(len(x)).shape)
             for name in kinds["IF"]}  # fmt: skip
    state["before"] = {name: jnp.zeros((len(x), *channels_last(graph.nodes[name].delay).shape)) for name in delays}
    _, (scores, counts) = jax.jit(lambda s: jax.lax.scan(step, s, length=num_steps))(state)
    found = {name.removesuffix("_spikes"): np.asarray(c.sum(0)) for name, c in counts.items()}
    return np.asarray(scores.mean(0)), found


def channels_last(values: Any) -> jax.Array:
    """NIR has channels first, Flax last."""
    return jnp.moveaxis(jnp.asarray(values, jnp.result_type(float)), 0, -1)


def layer(node: Any) -> nnx.Conv:
    """A convolution, as Spyx's importer makes it."""
    pads = [(int(p), int(p)) for p in np.broadcast_to(node.padding, 2)]
    out, into, *size = node.weight.shape
    dtype, strides = jnp.result_type(float), tuple(int(s) for s in np.broadcast_to(node.stride, 2))
    conv = nnx.Conv(into, out, tuple(size), strides, padding=pads, param_dtype=dtype, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.asarray(node.weight.transpose(2, 3, 1, 0), dtype)
    conv.bias[...] = jnp.asarray(node.bias, dtype)
    return conv


def neurons(node: Any) -> spyx.nn.IF:
    """Spyx's integrate-and-fire neurons, which reset by subtraction and fire above the threshold."""
    threshold = channels_last(node.v_threshold)
    return spyx.nn.IF(threshold.shape, threshold)


def start(node: Any) -> jax.Array:
    """The potential before the first step; between integers half a unit more, since we fire at the threshold."""
    found = float(node.metadata["initial_potential"]) * channels_last(node.v_threshold)
    return jnp.floor(found) + 0.5 if node.v_threshold.dtype.kind == "i" else found
