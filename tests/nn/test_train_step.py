"""One training step: memory, bad batches, more than one device."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax import configuration, data, nn
from mpisjax.configuration import makers
from mpisjax.storage import packing

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).parents[2]


def make(num_steps=4, mode="spikes", batch_size=8, side=12):
    config = configuration.base()
    config.model.update(stem=(4,), layers=(6, 8))
    config.forward.mode, config.forward.num_steps = mode, num_steps
    config.train.update(batch_size=batch_size, epochs=1, warmup_epochs=0.0, ema=0.9)
    images = np.random.default_rng(0).integers(0, 256, size=(batch_size, side, side, 1)).astype(np.uint8)
    labels = np.arange(batch_size, dtype=np.int32) % 3
    empty = data.Split(images[:0], labels[:0])
    dataset = data.DataSet(
        "noise", 3, data.Split(images, labels), empty, empty, (0.5,), (0.3,), False, "made up", "0" * 64
    )
    net = makers.make_network(config, dataset)
    variables = nn.init_variables(net, jax.random.key(0), jnp.zeros((1, side, side, 1)), makers.make_neuron(config))
    train_state = makers.init_state(config, variables, 10)
    batch = data.Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(batch_size))
    return makers.make_train_step(config, net, dataset, 10), train_state, batch


def temporary_bytes(num_steps, **size):
    """What XLA allocates for the training step beside arguments and results."""
    train_step, train_state, batch = make(num_steps, **size)
    return train_step.lower(train_state, batch).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_constant_in_the_number_of_time_steps():
    """The paper's headline: a training step by spikes needs as much memory at T = 1000 as at T = 1."""
    sizes = [temporary_bytes(num_steps) for num_steps in (1, 1000)]
    assert sizes[0] > 100_000, sizes
    assert max(sizes) <= 1.01 * min(sizes), sizes


@pytest.mark.slow
@pytest.mark.optimized
def test_memory_is_constant_at_the_size_of_fashion_mnist():
    sizes = [temporary_bytes(num_steps, batch_size=32, side=28) for num_steps in (1, 30, 1000)]
    assert sizes[0] > 5_000_000, sizes
    assert max(sizes) <= 1.02 * min(sizes), sizes


def test_a_step_that_is_not_finite_changes_nothing_and_counts():
    train_step, train_state, batch = make()
    images = batch.images.astype(jnp.float32)
    good = batch._replace(images=images)
    bad = batch._replace(images=images.at[3, 5, 5, 0].set(jnp.nan))

    def copy(tree):  # the step donates its state's buffers
        return jax.tree.map(np.array, packing.without_keys(tree)[1])

    train_state, metrics = train_step(train_state, good)
    assert metrics.finite == 1 and metrics.skipped == 0
    before = copy(train_state)
    for k in (1, 2):
        train_state, metrics = train_step(train_state, bad)
        assert metrics.finite == 0 and metrics.skipped == k
        assert int(train_state.step) == 1 + k and int(train_state.skipped) == k
        for part in ("params", "batch_stats", "opt_state", "ema", "rng"):
            now = copy(getattr(train_state, part))
            jax.tree.map(np.testing.assert_array_equal, now, getattr(before, part))
    train_state, metrics = train_step(train_state, good)
    assert metrics.finite == 1 and metrics.skipped == 0 and int(train_state.skipped) == 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), train_state.params, before.params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("mode", ["spikes", "rates"])
def test_steps_learn_the_batch_by_heart(mode):
    train_step, train_state, batch = make(mode=mode)
    losses = []
    for _ in range(12):
        train_state, metrics = train_step(train_state, batch)
        losses.append(float(metrics.loss))
        assert metrics.finite == 1 and metrics.adjoint_steps >= 1
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.slow
def test_two_devices_take_the_steps_that_one_takes():
    """Parameters, running statistics and metrics, after several steps, with augmentation and dropout."""
    program = textwrap.dedent(
        """
        import jax
        import numpy as np
        from mpisjax.cpu import cores
        from mpisjax.training import devices
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
        cores.prepare()
        from mpisjax import configuration, data, nn
        from mpisjax.configuration import makers
        from mpisjax.storage import checkpoints, packing
        from configs import digits

        config = digits.get_config()
        config.model.update(stem=(4,), layers=(6, 8), dropout=0.2)
        config.forward.update(mode="rates", max_steps=5, tol=0.0)  # spikes would turn rounding into flips
        config.adjoint.update(max_steps=5, tol=0.0)
        config.train.update(batch_size=16, warmup_epochs=0.0, learning_rate=0.05)
        dataset = makers.make_dataset(config)
        net = makers.make_network(config, dataset)

        def run(count):
            mesh = jax.sharding.Mesh(jax.devices()[:count], ("data",))
            train_step = makers.make_train_step(config, net, dataset, 10, mesh)
            variables = nn.init_variables(net, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32),
                                          makers.make_neuron(config))
            now = makers.init_state(config, variables, 10)
            now = jax.device_put(now, devices.replicated(mesh))
            for k in range(4):
                rows = slice(16 * k, 16 * k + 16)
                batch = data.Batch(dataset.train.images[rows], dataset.train.labels[rows],
                                   np.ones(16, np.float32))
                now, metrics = train_step(now, jax.device_put(batch, devices.batch_sharding(mesh)))
                assert len(metrics.loss.devices()) == count
                metrics = jax.device_get(metrics)
            return jax.device_get(packing.without_keys(now)[1]), metrics

        assert len(jax.devices()) == 2
        one, two = run(1), run(2)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        print("alike", len(jax.tree.leaves(one)))
        """
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("alike")
