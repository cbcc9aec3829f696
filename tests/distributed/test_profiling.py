"""Arithmetic of a step against hand counts, utilisation against a chip's peak, and a trace of a few steps."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpisjax import configuration
from mpisjax.configuration import makers
from mpisjax.training import step_runner
from mpisjax.training.step_runner import Meter, Tracer

pytestmark = pytest.mark.unoptimized

SIDE = 64


def step(state, batch):
    """A product, a loop of products that stops on a value, and a loop of a known length."""
    product = state @ batch
    product = lax.while_loop(lambda a: a.sum() > 1e9, lambda a: a @ a, product)
    product, _ = lax.scan(lambda a, _: (a @ a, None), product, None, length=3)
    return product, ()


def mesh(kind: str, devices: int) -> SimpleNamespace:
    each = SimpleNamespace(device_kind=kind)
    return SimpleNamespace(size=devices, devices=np.array([each] * devices))


def meter(kind: str, devices: int = 1, dtype: str = "float32") -> Meter:
    loops = makers.counted_loops(configuration.base())
    shape = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    step_of = jax.jit(step)
    return Meter(step_of, (shape, shape), mesh(kind, devices), loops=loops, batch_size=10, dtype=dtype)


def test_arithmetic_counts_the_turns_that_metrics_report():
    # 1 product, 3 in the scan, 2.5 in the loop; two operations each multiplication and addition; 40 steps a second.
    work = meter("cpu")({"adjoint_steps": 2.5}, 400.0)
    assert work.tflops == pytest.approx(6.5 * 2 * SIDE**3 * 40 / 1e12)
    assert work.utilisation is None


def test_utilisation_is_of_all_devices_and_of_the_dtype():
    means = {"adjoint_steps": 2.5}
    plain, coarse = (
        meter("NVIDIA H100 80GB HBM3", 4)(means, 400.0),
        meter("NVIDIA H100 80GB HBM3", 4, "bfloat16")(means, 400.0),
    )
    assert plain.utilisation == pytest.approx(plain.tflops / (4 * 494.0))
    assert coarse.utilisation == pytest.approx(plain.utilisation * 494 / 989)


def test_what_cannot_be_told_is_left_out():
    assert meter("cpu")({"adjoint_steps": 2.5}, None) is None
    assert meter("cpu")({"adjoint_steps": None}, 400.0) is None


@pytest.mark.parametrize(
    ("settings", "loops"),
    [
        ({}, ["adjoint_steps"]),
        ({"forward.mode": "rates"}, ["forward_steps", "adjoint_steps"]),
        ({"forward.settle_tol": 0.1, "adjoint.solver": "phantom"}, ["forward_steps"]),
        ({"train.method": "bptt"}, []),
        ({"adjoint.solver": "gmres"}, None),
    ],
)
def test_loops_of_a_config(settings, loops):
    config = configuration.base()
    config.update_from_flattened_dict(settings)
    assert makers.counted_loops(config) == loops


def test_a_trace_of_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(step_runner, "SKIPPED", 2)
    monkeypatch.setattr(step_runner, "TRACED", 2)
    tracer, add = Tracer(tmp_path / "profile"), jax.jit(lambda a: a + 1)
    state = jnp.zeros(3)
    for number in range(6):
        tracer.before_step(state)
        assert (tmp_path / "profile").exists() == (number >= 4)
        state = add(state)
    tracer.close(state)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_trace_unless_asked(tmp_path):
    tracer = Tracer(None)
    for _ in range(30):
        tracer.before_step(None)
    tracer.close()
    assert not list(tmp_path.iterdir())
