"""Compiles the training step of a config for a mesh of devices and says what it asks of each; runs nothing.

    python -m benchmarks.pod                                          # CIFAR-100, batch 1,024, 8 devices
    python -m benchmarks.pod --config configs/cifar10.py --devices 4 --model_parallel 2 --dtype bfloat16

The devices are this machine's CPU, split; no array is made. Printed are, for one device, the memory of
arguments and of temporaries as XLA's buffer assignment has them (another backend lays out and fuses
differently), the bytes that each kind of collective moves in a step, and the arithmetic of its convolutions
and matrix products.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from mpisjax.cli.arguments import Parser, whole_number

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
INPUTS = {
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "fashion_mnist": (28, 1, 10),
    "mnist": (28, 1, 10),
    "digits": (8, 1, 10),
}


def shape_bytes(text: str) -> int:
    """Bytes of all array shapes in a piece of HLO text."""
    return sum(BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in SHAPE.findall(text))


def computations(hlo: str) -> dict[str, list[str]]:
    """Lines by computation name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = opened.group(1)
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def in_loops(bodies: dict[str, list[str]]) -> set[str]:
    """Computations that run inside a loop, at whatever depth."""
    inside: set[str] = set()
    waiting = [
        n for lines in bodies.values() for line in lines for n in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
    ]
    while waiting:
        name = waiting.pop()
        if name in inside:
            continue
        inside.add(name)
        for line in bodies.get(name, ()):
            waiting += re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line)
    return inside


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Number of collectives and bytes of their results on one device, by kind, those in loops apart.

    An all-reduce of n bytes makes a ring of d devices send 2 (d - 1) / d * n bytes each.
    """
    bodies = computations(hlo)
    looped = in_loops(bodies)
    found: dict[str, dict[str, int]] = {}
    pattern = re.compile(rf"= (\(?.*?\)?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    for name, lines in bodies.items():
        for line in lines:
            if match := pattern.search(line):
                key = f"{match.group(2)}, each turn of a loop" if name in looped else match.group(2)
                entry = found.setdefault(key, {"count": 0, "bytes": 0})
                entry["count"] += 1
                entry["bytes"] += shape_bytes(match.group(1))
    return found


def compile_step(config: Any, mesh: Any, inputs: tuple[int, int, int]) -> tuple[Any, int, float]:
    """Compiles the step on a mesh; gives the executable, the parameters, and a batch's operations."""
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp

    from mpisjax.configuration import makers
    from mpisjax.data import Batch
    from mpisjax.nn.flops import count
    from mpisjax.training import devices

    side, channels, classes = inputs
    size = config.train.batch_size
    dataset: Any = SimpleNamespace(
        num_classes=classes,
        temporal=False,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        train=SimpleNamespace(images=jax.ShapeDtypeStruct((size, side, side, channels), jnp.uint8)),
    )
    net = makers.make_network(config, dataset)
    state = jax.eval_shape(lambda: makers.init_state(config, makers.initial_variables(config, net, dataset), 100))
    shardings = devices.state_sharding(state, mesh)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    rows = devices.batch_sharding(mesh)
    shapes: Any = (
        jax.ShapeDtypeStruct((size, side, side, channels), jnp.uint8, sharding=rows),
        jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((size,), jnp.float32, sharding=rows),
    )
    batch = Batch(*shapes)
    step: Any = makers.make_train_step(config, net, dataset, 100, mesh)
    # Every solve taken to its limit: forward, then adjoint.
    trips = [float(config.forward.max_steps)] * (config.forward.mode == "rates") + [float(config.adjoint.max_steps)]
    operations = count(makers.make_train_step(config, net, dataset, 100), state, batch, trips=trips)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return step.lower(state, batch).compile(), parameters, operations


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles and prints."""
    parser = Parser("python -m benchmarks.pod", __doc__)
    parser.add_argument("--config", default="configs/cifar100.py", help="config file, as train.py takes it")
    parser.add_argument("--batch_size", type=whole_number(1), default=1024, help="images in a batch")
    parser.add_argument("--devices", type=whole_number(1), default=8, help="devices that share it")
    parser.add_argument(
        "--model_parallel", type=whole_number(1), default=1, help="devices that share each layer's channels"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of currents and rates")
    parser.add_argument("--quick", action="store_true", help="compile with few optimisations: quicker, more memory")
    flags = parser.parse_args(argv)

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    jax.config.update("jax_disable_most_optimizations", flags.quick)
    from mpisjax.configuration import config_files, makers

    config = config_files.load_config(flags.config)
    config.train.batch_size, config.model.dtype = flags.batch_size, flags.dtype
    config.devices.model_parallel = flags.model_parallel
    mesh = makers.make_mesh(config, flags.batch_size)
    executable, parameters, operations = compile_step(config, mesh, INPUTS[config.data.name])
    memory = executable.memory_analysis()
    result = {
        "config": config.name,
        "parameters": parameters,
        "batch_size": flags.batch_size,
        "mesh": dict(mesh.shape),
        "dtype": flags.dtype,
        "jax": jax.__version__,
        "MiB of arguments, each device": round(memory.argument_size_in_bytes / 2**20, 1),
        "MiB of temporaries, each device": round(memory.temp_size_in_bytes / 2**20, 1),
        "MiB of results in the arguments' buffers, each device": round(memory.alias_size_in_bytes / 2**20, 1),
        "collectives": collectives(executable.as_text()),
        "TFLOP of convolutions and matrix products, whole batch, solves to their limits": round(operations / 1e12, 3),
    }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
