"""`data.steps_per_frame`: each frame is the input for several steps of a simulation."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import settings, write_nmnist

from mpisjax import configuration, data, nn
from mpisjax.configuration import makers
from mpisjax.data.augment import over_time
from mpisjax.errors import UserError
from mpisjax.export import job
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.simulate import SpikeForward, simulate
from mpisjax.training.step import mixed

pytestmark = pytest.mark.unoptimized


@pytest.fixture
def dataset():
    frames = np.random.default_rng(0).integers(0, 4, (12, 5, 6, 6, 2), np.uint8)
    return dataclasses.replace(data.from_arrays(frames, np.arange(12) % 3, test_share=0.5), steps_per_frame=3)


def test_every_step_sees_its_frame(dataset):
    images = jnp.asarray(dataset.train.images)
    once = data.prepare_images(images, dataclasses.replace(dataset, steps_per_frame=1))
    x = data.prepare_images(images, dataset)
    assert x.shape == (15, 6, 6, 6, 2) and once.shape[0] == 5
    for step in range(15):
        assert np.array_equal(x[step], once[step // 3])
    targets = jax.nn.one_hot(dataset.train.labels, 3)
    blended, _ = mixed(jax.random.key(0), images, targets, dataset, alpha=0.5)
    assert blended.shape == x.shape and np.array_equal(blended[0], blended[2])


def test_potentials_are_carried_from_frame_to_frame():
    """A current of 0.3 for one frame of three steps, then nothing: the neuron's charge waits for the next frame."""
    frames = jnp.array([[0.3], [0.0], [0.2]])[:, None]  # [T, batch, 1]

    def count(k):
        x = over_time(frames.swapaxes(0, 1), k)
        counts = simulate(
            lambda p, rates, x, fire: fire("out", x),
            {},
            x,
            jnp.zeros((1, 1)),
            neuron=LIF(initial_potential=0.0),
            forward=SpikeForward(None),
            time_axis=0,
            record=True,
        )
        return int(counts.spike_counts["out"][0, 0]), int(counts.num_steps[0])

    assert count(1) == (0, 3)
    assert count(3) == (1, 9)  # 0.9 after the first frame; 1.1 in the third


def test_the_whole_model_takes_that_many_steps(dataset):
    config = configuration.base()
    config.model.update(stem=(4,), layers=(6, 8))
    net, neuron = makers.make_network(config, dataset), LIF(leak=0.9)
    x = data.prepare_images(jnp.asarray(dataset.train.images[:2]), dataset)
    variables = jax.jit(lambda x: model.init_variables(net, jax.random.key(0), x, neuron))(x)
    run = jax.jit(lambda x: model.apply(net, variables, x, neuron=neuron, forward=SpikeForward(None)))
    out = run(x)
    assert out.equilibrium.num_steps == 15
    by_hand = np.repeat(dataset.train.images[:2], 3, 1)
    other = run(data.prepare_images(jnp.asarray(by_hand), dataclasses.replace(dataset, steps_per_frame=1)))
    assert np.array_equal(out.logits, other.logits)


def test_the_setting_reaches_the_data_set(tmp_path):
    write_nmnist(tmp_path, np.random.default_rng(0), 20, 10)
    config = settings(name="nmnist", dir=str(tmp_path), num_validation=0, num_frames=4, steps_per_frame=5)
    dataset = data.load(**config)
    assert dataset.steps_per_frame == 5 and dataset.train.images.shape[1] == 4
    with pytest.raises(UserError, match="data.steps_per_frame is 2, but for digits must be 1"):
        data.load(**settings(steps_per_frame=2))
    config["steps_per_frame"] = 0
    with pytest.raises(UserError, match="at least 1"):
        data.load(**config)


def test_nir_which_cannot_say_it_refuses_it(dataset):
    trained = SimpleNamespace(name="mine", net=nn.MPIS(3, temporal=True), inputs=dataset)
    with pytest.raises(UserError, match="each frame for 3 steps"):
        job.prepare(trained, job.Options())
