"""Trained networks that come with the package, ready to classify.

`load_pretrained("digits")` gives the network, its weights, its settings and its card, which says how it was
trained and what it reaches. `python -m mpisjax.pretrained` makes such a network from a run's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.errors import UserError
from mpisjax.paths import expand

if TYPE_CHECKING:
    import ml_collections

    from mpisjax.neurons import LIF
    from mpisjax.nn.model import Output
    from mpisjax.nn.mpis import MPIS
    from mpisjax.simulate import SpikeForward
    from mpisjax.training.run import Parts
    from mpisjax.training.state import TrainState


class Inputs(NamedTuple):
    """What a network reads and what its answers mean; `mpisjax.data.DataSet` without the examples.

    Attributes:
        name: The data set's name in the configuration.
        num_classes: The number of classes.
        classes: Their names.
        shape: Of an example: (H, W, C), or (T, H, W, C) for frames.
        mean: Per channel, of the pixels / 255, that training subtracted.
        std: Per channel, of the pixels / 255, that training divided by.
        temporal: Whether an example is a sequence of frames.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: bool


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
        name: Its name.
        net: The network, as `mpisjax.nn` takes it.
        neuron: Its neurons.
        forward: Its simulation, with as many time steps as it was trained for.
        apply: `apply(variables, images, value_range=None) -> mpisjax.nn.Output` classifies a batch of images,
            [batch, *inputs.shape], by the equivalent path of the network's spikes. Images are uint8, or have
            any other dtype and a `value_range`, the (black, white) of their pixels, such as (0, 1). Pure: it
            can be `jit`-compiled (with `value_range` static) and differentiated. Anything else is a
            `UserError` when the call is traced.
        params: The parameters.
        batch_stats: The running statistics of batch normalisation.
        config: Every setting the network was trained with.
        inputs: What it reads.
        card: How it was made and what it reaches, as JSON.
    """

    name: str
    net: MPIS
    neuron: LIF
    forward: SpikeForward
    apply: Callable[..., Output]
    params: Any
    batch_stats: Any
    config: ml_collections.ConfigDict
    inputs: Inputs
    card: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and running statistics, as `apply` and `mpisjax.nn` take them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def available() -> list[str]:
    """The names of the networks that come with the package."""
    from mpisjax import weights

    return weights.available()


def load_pretrained(name: str, folder: str | Path | None = None) -> Pretrained:
    """Loads a trained network that comes with the package.

    Args:
        name: One of `mpisjax.pretrained.available()`.
        folder: Where its two files are; None: in the package.

    Returns:
        The network, its arrays on the default device.

    Raises:
        UserError: There is no such network, or its files are damaged.
    """
    from mpisjax import configuration, weights

    variables, card = weights.read(name, weights.FOLDER if folder is None else Path(expand(folder)))
    config = configuration.with_defaults(configuration.from_plain(card["config"]))
    tuples = ("classes", "shape", "mean", "std")
    fields: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in card["inputs"].items()}
    inputs = Inputs(**fields)
    return from_variables(name, config, inputs, variables, card)


def from_variables(
    name: str, config: ml_collections.ConfigDict, inputs: Inputs, variables: Any, card: dict[str, Any]
) -> Pretrained:
    """Makes a `Pretrained` from its settings and its weights.

    Raises:
        UserError: The weights are another network's.
    """
    from mpisjax import configuration, weights
    from mpisjax.data import prepare_images
    from mpisjax.nn import model

    readable: Any = inputs  # stands in for the data set it describes
    net, neuron = configuration.make_network(config, readable), configuration.make_neuron(config)
    forward = configuration.make_spike_forward(config, inputs.temporal)

    def apply(
        variables: dict[str, Any], images: Any, value_range: tuple[float, float] | None = None
    ) -> Output:
        x = prepare_images(as_pixels(images, inputs, value_range), inputs)
        return model.apply(net, variables, x, neuron=neuron, forward=forward)

    def initial() -> Any:
        x = prepare_images(jnp.zeros((1, *inputs.shape), jnp.uint8), inputs)
        return model.init_variables(net, jax.random.key(0), x, neuron)

    variables = jax.tree.map(jnp.asarray, variables)
    with jax.enable_x64(False):  # the weights are float32, whatever the program's own precision
        weights.check_fit(variables, jax.eval_shape(initial), f"pretrained network {name!r}")
    return Pretrained(
        name=name,
        net=net,
        neuron=neuron,
        forward=forward,
        apply=apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        config=config,
        inputs=inputs,
        card=card,
    )


def as_pixels(images: Any, inputs: Inputs, value_range: tuple[float, float] | None = None) -> jax.Array:
    """A batch of images in the 0..255 that networks are trained on.

    Args:
        images: [batch, *inputs.shape]: uint8, or any real dtype or bool with `value_range`.
        inputs: What the network reads.
        value_range: The pixel values of black and of white. None: 0 and 255, of uint8 alone.

    Returns:
        uint8 as it was, or float32 scaled to 0..255; nothing is clipped.

    Raises:
        UserError: The shape is another, the dtype leaves the range open, or the range is empty.
    """
    if not isinstance(images, jax.Array | np.ndarray):
        images = np.asarray(images)
    wanted = ", ".join(map(str, inputs.shape))
    if images.shape[1:] != inputs.shape:
        one = images.shape == inputs.shape
        raise UserError(
            f"this network reads images of shape [batch, {wanted}] and was given {list(images.shape)}; "
            + ("add a batch axis, as in images[None]" if one else "bring them to that shape")
        )
    if value_range is None:
        if images.dtype != np.uint8:
            raise UserError(
                f"this network reads uint8 pixels and was given {images.dtype}; say which values are black "
                "and white, "
                "as in value_range=(0, 1)"
            )
        return jnp.asarray(images)
    low, high = value_range
    if not -np.inf < low < high < np.inf:
        raise UserError(f"value_range is {value_range!r}: give two finite numbers, black before white")
    return (jnp.asarray(images).astype(jnp.float32) - low) * (255 / (high - low))


def restore(name: str, config: ml_collections.ConfigDict) -> tuple[Parts, TrainState, int]:
    """A pretrained network in the place of a run's best state, as `mpisjax.training.run.restore_best` gives
    it.

    Args:
        name: The network's name.
        config: Its config, perhaps with other settings of data and evaluation.

    Returns:
        The parts that the config stands for, the state with the network's weights, and the step they are
        from.

    Raises:
        UserError: There is no such network, it is damaged, or the data are missing or of another kind.
    """
    import logging

    from mpisjax import weights
    from mpisjax.training.run import assemble

    found, parts = load_pretrained(name), assemble(config)
    state = parts.state
    weights.check_fit(
        found.variables,
        {"params": state.params, "batch_stats": state.batch_stats},
        f"pretrained network {name!r}",
    )
    if parts.dataset.checksum != found.card["data"]["checksum"]:
        logging.getLogger(__name__).warning(
            "the data here are not those that the card of %r was made with: figures may differ", name
        )
    variables = jax.device_put(found.variables, jax.tree.leaves(state.params)[0].sharding)
    state = state._replace(params=variables["params"], batch_stats=variables["batch_stats"], ema=())
    return parts, state, int(found.card["training"]["steps"])
