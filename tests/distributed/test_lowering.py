"""Nothing CPU-only is left in the path: training step and evaluation lower for TPU, CUDA and CPU, for every kind of
config.

They are lowered as a run on eight devices would compile them, from shapes alone: no array is made, and no such device
is needed. What a platform's compiler then does with the program is not tried here.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType

from mpisjax import cpu
from mpisjax.configuration import config_files, makers
from mpisjax.data import Batch, prepare_images
from mpisjax.nn import model
from mpisjax.training.evaluation import make_eval_step
from mpisjax.training.state import TrainState

pytestmark = pytest.mark.unoptimized

PLATFORMS = ("tpu", "cuda", "cpu")
DEVICES = 8
FOLDER = Path(__file__).resolve().parents[2] / "configs"
# Frames, side, channels, classes; no frames where input is constant.
INPUTS = {
    "digits": (0, 8, 1, 10),
    "mnist": (0, 28, 1, 10),
    "fashion_mnist": (0, 28, 1, 10),
    "cifar10": (0, 32, 3, 10),
    "cifar100": (0, 32, 3, 100),
    "nmnist": (30, 34, 2, 10),
    "saccade_digits": (10, 34, 2, 10),
    "folder": (0, 32, 3, 3),
    "arrays": (0, 8, 1, 10),
    "recordings": (10, 34, 2, 10),
    "shd": (50, 1, 700, 20),
    "ssc": (50, 1, 700, 35),
}


QUICK = ("digits", "mnist", "shd")  # spikes, rates and input over time; the others where there is time


def structure_of(config: Any) -> tuple[Any, ...]:
    """What of a config decides which operations its programs have: sizes and rates are left out."""

    def kind(value: Any) -> Any:
        if isinstance(value, tuple):
            return len(value)
        return value if isinstance(value, str) else bool(value)

    flat = flatten_dict({key: config[key].to_dict() for key in ("neuron", "forward", "adjoint", "model", "train")})
    kinds = {key: kind(value) for key, value in flat.items()}
    temporal, fused, leaky = INPUTS[config.data.name][0] > 0, config.model.num_streams > 1, config.neuron.leak < 1.0
    return (temporal, fused, leaky, *sorted(kinds.items()))


def every() -> list[Any]:
    """Of the config files and their variants one of each structure."""
    found: dict[Any, Any] = {}
    for path in sorted(FOLDER.glob("*.py"), key=lambda path: (path.stem not in QUICK, path.stem)):
        for variant in (None, *runpy.run_path(str(path)).get("VARIANTS", {})):
            config = config_files.load_config(f"{path}:{variant}" if variant else str(path))
            marks = [] if variant is None and path.stem in QUICK else [pytest.mark.slow]
            name = f"{path.stem}-{variant or 'plain'}"
            found.setdefault(structure_of(config), pytest.param(config, id=name, marks=marks))
    return list(found.values())


def shapes_of(config: Any) -> tuple[SimpleNamespace, Any, TrainState, Batch]:
    """Data, network, state and batch of a config; of arrays the shapes alone."""
    frames, side, channels, classes = INPUTS[config.data.name]
    side = config.data.crop or side
    shape = (*((config.data.num_frames,) if frames else ()), side, side, channels)
    dataset = SimpleNamespace(
        num_classes=classes,
        temporal=bool(frames),
        steps_per_frame=1,
        mean=(0.3,) * channels,
        std=(0.3,) * channels,
        train=SimpleNamespace(images=jax.ShapeDtypeStruct((1, *shape), jnp.uint8)),
    )
    net = makers.make_network(config, dataset)

    def initial() -> TrainState:
        images = prepare_images(jnp.zeros((1, *shape), jnp.uint8), dataset)
        variables = model.init_variables(net, jax.random.key(0), images, makers.make_neuron(config))
        return makers.init_state(config, variables, steps_per_epoch=100)

    size = -(-config.train.batch_size // DEVICES) * DEVICES
    batch = Batch(
        jax.ShapeDtypeStruct((size, *shape), jnp.uint8),
        jax.ShapeDtypeStruct((size,), jnp.int32),
        jax.ShapeDtypeStruct((size,), jnp.float32),
    )
    return dataset, net, jax.eval_shape(initial), batch


# A custom call is a promise that the platform has a kernel of that name. Small dense solves (Anderson's mixing, GMRES)
# are the only ones: JAX brings their kernels along, and `export` itself refuses names that it does not vouch for.
KERNELS = {"cpu": r"lapack_\w+", "cuda": r"(cusolver|cublas|cu)_\w+", "tpu": r"(LuDecomposition|Cholesky)"}


# Notes to the partitioner, gone once it has run.
SHARDING = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


def check(function: Any, *shapes: Any) -> None:
    exported = jax.export.export(function, platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS and exported.nr_devices == DEVICES
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text and "callback" not in text
    if "stablehlo.custom_call" not in text:
        return
    traced = function.trace(*shapes)
    for platform, kernels in KERNELS.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        for name in set(re.findall(r"custom_call @([\w.]+)", text)) - SHARDING:
            assert re.fullmatch(kernels, name), f"{name} on {platform}"


def lower(config: Any) -> None:
    dataset, net, state, batch = shapes_of(config)
    mesh = AbstractMesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    with cpu.disabled():  # as where the first platform is no CPU
        check(makers.make_train_step(config, net, dataset, 100, mesh), state, batch)
        evaluated = make_eval_step(
            net,
            dataset,
            neuron=makers.make_neuron(config),
            forward=makers.make_spike_forward(config, dataset.temporal),
            bptt=makers.make_bptt(config),
            mesh=mesh,
        )
        check(evaluated, variables, batch)


@pytest.mark.parametrize("config", every())
def test_every_kind_of_config_lowers_for_every_platform(config):
    lower(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"model.dtype": "bfloat16"},
        {"forward.mode": "rates", "forward.solver": "anderson", "adjoint.solver": "anderson"},
        {"forward.settle_tol": 0.01, "adjoint.solver": "gmres"},
        {"adjoint.solver": "bicgstab", "train.jacobian_penalty": 0.1, "train.ema": 0.99},
        {"adjoint.solver": "normal_cg", "model.dropout": 0.2, "model.head": "smallest"},
        {"train.method": "bptt", "train.gradient_clip": 1.0},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_every_solver_lowers_for_every_platform(settings):
    config = config_files.load_config(str(FOLDER / "digits.py"))
    config.update_from_flattened_dict(settings)
    lower(config)
