"""The networks that are measured, after a few training steps on enlarged digits."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from sklearn.datasets import load_digits

from mpisjax import configuration
from mpisjax.configuration import config_files, makers
from mpisjax.data import Batch, prepare_images
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.training.devices import batch_sharding, data_mesh, replicated
from mpisjax.training.state import TrainState

Array = jax.Array
STEPS_PER_EPOCH = 468


class Images(NamedTuple):
    """What a training step needs to know of a data set."""

    shape: tuple[int, int, int] = (28, 28, 1)
    mean: tuple[float, ...] = (0.2860,)
    std: tuple[float, ...] = (0.3530,)
    num_classes: int = 10
    temporal: bool = False
    steps_per_frame: int = 1


class Case(NamedTuple):
    """A network to measure.

    Attributes:
        title: Its name in tables.
        config: All settings.
        dataset: What a training step needs to know of the data.
        net: The network.
    """

    title: str
    config: ml_collections.ConfigDict
    dataset: Images
    net: MPIS


def case(name: str, *, batch_size: int = 0, dtype: str = "float32", **settings: Any) -> Case:
    """A case by name.

    Args:
        name: "f64c5": one stream, one 5x5 convolution of 64 channels, leak 0.95, batch 64; "fashion": the
          paper's size for Fashion-MNIST, two streams, 128K parameters, IF neurons, batch 128; "cifar100":
          configs/cifar100.py, two streams, 29.7M parameters, batch 128.
        batch_size: Instead of the usual one; 0 keeps that.
        dtype: Of currents and rates.
        **settings: Of `config.model`, instead of the usual ones.
    """
    config, dataset = configuration.base(), Images()
    if name == "f64c5":
        config.model.update(num_streams=1, stem=(), stem_strides=(), layers=(64,), fusion_layer=1, stride_layer=0)
        config.model.update(kernel_size=5, head="smallest")
        config.neuron.leak = 0.95
        config.train.batch_size = 64
        title = "F64C5"
    elif name == "fashion":
        config.data.augment.update(flip=True, shift=2)
        # As configs/fashion_mnist.py sets them.
        config.forward.update(max_steps=4, tol=2e-2)
        config.adjoint.update(max_steps=4, tol=2e-2)
        config.train.update(batch_size=128, label_smoothing=0.1)
        title = "Fashion-MNIST net"
    elif name == "cifar100":
        config, title = config_files.load_config("cifar100"), "CIFAR-100 net"
        dataset = Images((32, 32, 3), mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=100)
    else:
        raise ValueError(f"unknown case {name!r}: choose f64c5, fashion or cifar100")
    config.model.update(settings)
    config.model.dtype = dtype
    config.forward.mode = "rates"
    # Almost 0, so that warm-up steps settle the running statistics and leave the weights as they were
    # initialised.
    config.train.learning_rate = 1e-6
    config.train.warmup_epochs = 0.0
    if batch_size:
        config.train.batch_size = batch_size
    return Case(title, config, dataset, makers.make_network(config, cast(Any, dataset)))


def with_forward(c: Case, mode: int | str, **settings: Any) -> Case:
    """The case with a number of time steps or "rates", and settings such as "forward.tol"."""
    config = c.config.copy_and_resolve_references()
    config.forward.mode = "rates" if mode == "rates" else "spikes"
    if mode != "rates":
        config.forward.num_steps = mode
    config.update_from_flattened_dict(settings)
    return c._replace(config=config)


def host_batch(batch_size: int, shape: tuple[int, int, int] = (28, 28, 1)) -> Batch:
    """A batch of digits, enlarged to a height and width and repeated in each channel."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    rows, columns = (np.arange(side) * 8 // side for side in shape[:2])
    chosen = np.arange(batch_size) % len(images)
    enlarged = (images[chosen][:, rows][:, :, columns] * (255 / 16)).astype(np.uint8)
    arrays: Any = (
        np.repeat(enlarged[..., None], shape[2], -1),
        labels[chosen].astype(np.int32),
        np.ones(batch_size, np.float32),
    )
    return Batch(*arrays)


class Subject:
    """A case on devices, ready to be timed.

    Attributes:
        case: What is measured.
        mesh: The devices.
        batch: The batch, on the devices.
        state: The training state after `warmup` steps in rate mode.
    """

    def __init__(self, c: Case, *, num_devices: int | None = None, warmup: int = 10) -> None:
        self.case, batch_size = c, c.config.train.batch_size
        if num_devices is None:
            self.mesh = data_mesh(batch_size, c.config.devices.all_cores)
        else:
            self.mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("data",))
        self.batch = jax.device_put(host_batch(batch_size, c.dataset.shape), batch_sharding(self.mesh))
        zeros = jnp.zeros((2, *c.dataset.shape))
        variables = model.init_variables(c.net, jax.random.key(0), zeros, makers.make_neuron(c.config))
        state = jax.device_put(makers.init_state(c.config, variables, STEPS_PER_EPOCH), replicated(self.mesh))
        step = self.train_step("rates")
        for _ in range(warmup):
            state, metrics = step(state, self.batch)
            jax.block_until_ready(metrics)
        self.state: TrainState = state

    def train_step(self, mode: int | str, **settings: Any) -> Any:
        """The `jit`-compiled training step, which donates its state."""
        c = with_forward(self.case, mode, **settings)
        return makers.make_train_step(c.config, c.net, cast(Any, c.dataset), STEPS_PER_EPOCH, self.mesh)

    def step_arguments(self) -> tuple[TrainState, Batch]:
        """A copy of the state, to be donated, and the batch."""
        return jax.tree.map(jnp.copy, self.state), self.batch

    def inference(self, mode: int | str, **settings: Any) -> Any:
        """`jit`-compiled `(variables, batch) -> (logits, steps)`, by the equivalent path."""
        c = with_forward(self.case, mode, **settings)
        neuron, forward = makers.make_neuron(c.config), makers.make_forward(c.config)

        def run(variables: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
            x = prepare_images(batch.images, c.dataset)
            out = model.apply(c.net, variables, x, neuron=neuron, forward=forward)
            return out.logits, out.equilibrium.num_steps

        whole, split = replicated(self.mesh), batch_sharding(self.mesh)
        return jax.jit(run, in_shardings=(whole, split), out_shardings=(split, whole))

    def variables(self) -> dict[str, Any]:
        """Parameters and running statistics."""
        return {"params": self.state.params, "batch_stats": self.state.batch_stats}
