"""A network made elsewhere: a NIR graph as a transition that is solved, differentiated and fine-tuned here.

One unit of NIR's time is one step. A `Delay` of 1 is what the transition feeds back, so every cycle needs one. Neurons
are the four nodes that `mpisjax.export.nir_graph` writes (a potential that is reset through a Threshold, a Delay and a
Scale), or IF and LIF nodes whose metadata say `reset: subtract`.
"""

from __future__ import annotations

import copy
import graphlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.export.nir_nodes import MAX_WEIGHTS, Population, find_populations, package
from mpisjax.neurons import LIF
from mpisjax.nn.convolution import conv2d

if TYPE_CHECKING:
    import nir

Array = jax.Array
MAX_NEURONS = 2**26
# What can be trained of a node, by its kind.
WEIGHTS = {"Conv2d": ("weight", "bias"), "Affine": ("weight", "bias"), "Linear": ("weight",), "Scale": ("scale",)}


class Imported(NamedTuple):
    """A NIR graph as mpisjax takes it.

    Attributes:
        transition: `transition(params, rates, x, fire) -> rates`. The input `x` is [batch, *input's shape], as the
            graph has it (channels first). The rates hold the output of every Delay that is fed back and of every
            Output, by the node's name.
        params: Weights and biases by node.
        initial_rates: `initial_rates(batch)`: zeros of the rates' shapes.
        neuron: The neurons' leak, and the threshold and the start of those that have all in common.
        graph: The graph itself; `with_params` writes other weights into it.
    """

    transition: Callable[..., dict[str, Array]]
    params: dict[str, dict[str, Array]]
    initial_rates: Callable[[int], dict[str, Array]]
    neuron: LIF
    graph: Any


def from_nir(graph: nir.NIRGraph | str | Path, *, reset: str = "") -> Imported:
    """Reads a NIR graph.

    Args:
        graph: A `nir.NIRGraph`, or the path of a file.
        reset: "subtract": take IF and LIF nodes to reset by subtraction, although they do not say so. NIR's own reset
            to a value has no equilibrium that a rate describes.

    Raises:
        UserError: The file cannot be read, or the graph has unknown nodes, shapes that do not fit, a cycle without
            a delay, weights that are not finite, more than `MAX_WEIGHTS` numbers, or neurons with other equations.
    """
    if reset not in ("", "subtract"):
        raise UserError(f"reset is {reset!r}: choose 'subtract', or leave it out.")
    graph = read(graph) if isinstance(graph, str | Path) else graph
    try:
        return _imported(graph, reset)
    except UserError:
        raise
    except Exception as error:  # a damaged graph can fail anywhere
        raise UserError(f"the NIR graph is not sound: {_short(error)}.") from error


def _imported(graph: Any, reset: str) -> Imported:
    _check_nodes(graph)
    populations = find_populations(graph, reset)
    inside = {name for p in populations.values() for name in p.inside}
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        if target not in inside:
            sources[target].append(source)
    for p in populations.values():
        sources[p.name] = list(p.sources)
    kept = [name for name in graph.nodes if name not in inside]
    delays = [name for name in kept if _kind(graph, name) == "Delay"]
    order = _order({n: [s for s in sources[n] if s not in delays] for n in kept if n not in delays})
    outputs = [name for name in kept if _kind(graph, name) == "Output"]
    dtype = jnp.result_type(float)
    params = {
        name: {key: jnp.asarray(getattr(graph.nodes[name], key)).astype(dtype) for key in WEIGHTS[_kind(graph, name)]}
        for name in kept
        if _kind(graph, name) in WEIGHTS
    }

    def transition(params: Any, rates: Any, x: Any, fire: Any) -> dict[str, Array]:
        values: dict[str, Any] = {name: rates[name] for name in delays}
        for name in order:
            given = x if _kind(graph, name) == "Input" else _sum(name, [values[s] for s in sources[name]])
            values[name] = _compute(name, graph.nodes[name], params.get(name), populations.get(name), given, fire)
            _check_size(name, values[name].shape[1:])
        fed_back = {name: _sum(name, [values[s] for s in sources[name]]) for name in delays}
        return fed_back | {name: values[name] for name in outputs}

    shapes = {name: _shape(graph, name) for name in (*delays, *outputs)}

    def initial_rates(batch: int) -> dict[str, Array]:
        return {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}

    found = Imported(transition, params, initial_rates, _common(populations), graph)
    _check_shapes(found)
    return found


def with_params(imported: Imported, params: dict[str, dict[str, Any]]) -> Any:
    """The graph with other weights, to be written with `nir.write`."""
    graph = copy.deepcopy(imported.graph)
    for name, values in params.items():
        for key, value in values.items():
            old = np.asarray(getattr(graph.nodes[name], key))
            setattr(graph.nodes[name], key, np.asarray(value).astype(np.result_type(old, np.float32)))
    return graph


def read(path: str | Path) -> Any:
    """Reads a file, after a look at how large it is.

    Raises:
        UserError: It is no NIR file, or too large.
    """
    nir = package()
    import h5py

    try:
        with h5py.File(path, "r") as file:
            sizes: list[int] = []
            file.visititems(lambda _, item: sizes.append(item.size if isinstance(item, h5py.Dataset) else 0))
        total = sum(size or 0 for size in sizes)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a NIR file: {_short(error)}.") from error
    if total > 4 * MAX_WEIGHTS:
        raise UserError(f"{path} holds {total:,} numbers, more than the {4 * MAX_WEIGHTS:,} that are read.")
    try:
        return nir.read(path)
    except Exception as error:  # a damaged graph can fail anywhere in its constructors
        raise UserError(f"{path} holds no sound NIR graph: {_short(error)}.") from error


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def _kind(graph: Any, name: str) -> str:
    return type(graph.nodes[name]).__name__


def _shape(graph: Any, name: str) -> tuple[int, ...]:
    (shape,) = graph.nodes[name].output_type.values()
    if shape is None:
        raise UserError(f"the node {name!r} does not say its shape: give the Input and each Conv2d one.")
    return tuple(int(n) for n in np.atleast_1d(shape))


def _check_nodes(graph: Any) -> None:
    known = {"Input", "Output", "Delay", "Flatten", *WEIGHTS, "I", "LI", "IF", "LIF", "Threshold"}
    for name in graph.nodes:
        if _kind(graph, name) not in known:
            raise UserError(
                f"the node {name!r} is a {_kind(graph, name)}, which is not read: {', '.join(sorted(known))} are."
            )
    total = 0
    for name, node in graph.nodes.items():
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                total += value.size
                if not np.all(np.isfinite(value)):
                    raise UserError(f"{key} of the node {name!r} holds values that are not finite.")
            elif isinstance(value, np.ndarray):
                raise UserError(f"{key} of the node {name!r} holds {value.dtype}, which are no real numbers.")
        if _kind(graph, name) == "Delay" and not np.all(node.delay == 1):
            raise UserError(f"the Delay {name!r} is not of 1 step: other delays are not read.")
        if _kind(graph, name) in ("Input", "Output", "Delay"):
            _check_size(name, _shape(graph, name))
    if total > 4 * MAX_WEIGHTS:
        raise UserError(f"the graph holds {total:,} numbers, more than the {4 * MAX_WEIGHTS:,} that are read.")
    for edge in graph.edges:
        for end in edge:
            if end not in graph.nodes:
                raise UserError(f"an edge names the node {end!r}, which the graph does not have.")
    inputs = [name for name in graph.nodes if _kind(graph, name) == "Input"]
    if len(inputs) != 1:
        raise UserError(f"the graph has {len(inputs)} Input nodes: it needs exactly 1.")
    fed = {target for _, target in graph.edges}
    for name in graph.nodes:
        if name not in fed and name not in inputs:
            raise UserError(f"nothing leads to the node {name!r}.")
    if not any(_kind(graph, name) == "Output" for name in graph.nodes):
        raise UserError("the graph has no Output node.")


def _check_size(name: str, size: tuple[int, ...]) -> None:
    if math.prod(size) > MAX_NEURONS:
        raise UserError(f"the node {name!r} has more than {MAX_NEURONS:,} entries.")


def _order(sources: dict[str, list[str]]) -> list[str]:
    try:
        return list(graphlib.TopologicalSorter(sources).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise UserError(f"the graph has a cycle without a Delay of 1: {circle}.") from error


def _sum(name: str, values: list[Any]) -> Any:
    shapes = {v.shape for v in values}
    if len(shapes) > 1:
        both = " and ".join(str(list(s[1:])) for s in sorted(shapes))
        raise UserError(f"the node {name!r} is given values of shapes {both}, which cannot be added.")
    return sum(values[1:], values[0])


def _compute(name: str, node: Any, params: Any, population: Population | None, given: Any, fire: Any) -> Any:
    if population is not None:
        current = given * population.gain if np.any(population.gain != 1) else given
        return fire(population.name, current, population.neuron)
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return given
    if kind == "Conv2d":
        return _conv(node, params, given)
    if kind == "Scale":
        return given * params["scale"]
    if kind == "Flatten":
        shape = node.output_type["output"]
        return given.reshape(given.shape[0], *(int(n) for n in shape))
    out = given @ params["weight"].T
    return out + params["bias"] if kind == "Affine" else out


def _conv(node: Any, params: Any, x: Array) -> Array:
    stride, dilation = (tuple(int(n) for n in np.broadcast_to(v, 2)) for v in (node.stride, node.dilation))
    pad = node.padding if isinstance(node.padding, str) else tuple(map(int, np.broadcast_to(node.padding, 2)))
    weight, bias = params["weight"], params["bias"][:, None, None]
    k, groups = weight.shape[-1], int(node.groups)
    ours = isinstance(pad, tuple) and set(pad) == {k // 2} and k % 2 and weight.shape[-2] == k
    if ours and set(stride) == set(dilation) == {1} and groups == 1:  # fast in a solver's loop on a CPU
        out = conv2d(jnp.moveaxis(x, 1, -1), weight.transpose(2, 3, 1, 0), 1)
        return jnp.moveaxis(out, -1, 1) + bias
    padding = pad.upper() if isinstance(pad, str) else [(p, p) for p in pad]
    return bias + jax.lax.conv_general_dilated(
        x, weight, stride, padding, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )  # fmt: skip


def _common(populations: dict[str, Population]) -> LIF:
    """The neuron that weights the rates: every population must have its leak."""
    leaks = sorted({p.neuron.leak for p in populations.values()})
    if len(leaks) > 1:
        raise UserError(f"the populations have leaks of {leaks}: rates need one leak for all.")
    return LIF(leak=leaks[0]) if leaks else LIF()


def _check_shapes(imported: Imported) -> None:
    """One step on shapes alone, node by node."""
    graph = imported.graph
    name = next(n for n in graph.nodes if _kind(graph, n) == "Input")
    rates = jax.eval_shape(lambda: imported.initial_rates(1))
    x = jax.ShapeDtypeStruct((1, *_shape(graph, name)), jnp.result_type(float))
    seen = lambda name, current, neuron=None: current  # noqa: E731
    try:
        out = jax.eval_shape(lambda p, r, x: imported.transition(p, r, x, seen), imported.params, rates, x)
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise UserError(f"the shapes of the graph do not fit: {_short(error)}.") from error
    for name, found in out.items():
        if found.shape != rates[name].shape:
            raise UserError(
                f"the node {name!r} is given shape {list(found.shape[1:])}, and says that it is "
                f"{list(rates[name].shape[1:])}."
            )
