"""Trained networks that come with the package: weights, config, and a card that says how they were made.

A network is two files here: `NAME.safetensors` (arrays and nothing else: nothing in it can execute) and `NAME.json`,
its card: config, training command, commit, machine, accuracies, and the SHA-256 of the weights, which is checked
whenever they are read. `python -m mpisjax.pretrained` makes both from a run's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpisjax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

    from mpisjax.nn.model import Output
    from mpisjax.nn.mpis import MPIS

FOLDER = Path(__file__).parent
MAX_BYTES = 2_000_000  # of a weights file
_SEPARATOR = "/"


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
        apply: `apply(variables, images) -> mpisjax.nn.Output`: classifies uint8 images of `inputs.shape`, with a
            batch axis in front, by the equivalent path of its spikes. Pure; may be `jit`-compiled and differentiated.
        params: Its parameters.
        batch_stats: The running statistics of batch normalisation.
        config: Every setting it was trained with.
        inputs: What it reads.
        card: How it was made and what it reaches, as JSON.
    """

    name: str
    net: MPIS
    apply: Callable[[dict[str, Any], Any], Output]
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
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def load_pretrained(name: str, folder: str | Path | None = None) -> Pretrained:
    """Loads a trained network that comes with the package.

    Args:
        name: One of `mpisjax.pretrained.available()`.
        folder: Where its two files lie, if not in the package.

    Returns:
        The network, its arrays on the default device.

    Raises:
        UserError: There is no such network, or its files are damaged.
    """
    from mpisjax import configuration

    where = FOLDER if folder is None else Path(folder)
    weights, card = read_files(where, name)
    config = configuration.completed(configuration.from_plain(card["config"]))
    inputs = inputs_of(card["inputs"])
    return assembled(name, config, inputs, weights, card)


def read_files(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies the two files of a network.

    Returns:
        Its variables (NumPy arrays) and its card.

    Raises:
        UserError: A file is missing or not what its card says.
    """
    import safetensors
    import safetensors.numpy

    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
        card = json.loads(path.with_suffix(".json").read_bytes())
        promised = card["sha256"]
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        raise UserError(
            f"there is no pretrained network {name!r} ({error.filename} is missing); there are: {known}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.with_suffix('.json')} is not a card; install the package again") from error
    if hashlib.sha256(data).hexdigest() != promised:
        raise UserError(
            f"{path} does not have the SHA-256 that its card promises: it has been cut short or altered; install the "
            "package again"
        )
    try:
        return nested(safetensors.numpy.load(data)), card
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} holds no safetensors ({error}); make it again") from error


def assembled(
    name: str, config: ml_collections.ConfigDict, inputs: Inputs, variables: Any, card: dict[str, Any]
) -> Pretrained:
    """Puts a network together, and makes sure that the weights are its own.

    Raises:
        UserError: They are another network's.
    """
    import jax
    import jax.numpy as jnp

    from mpisjax import configuration
    from mpisjax.nn import model
    from mpisjax.training.start import check_fits
    from mpisjax.training.step import prepare_images

    readable: Any = inputs  # stands in for the data set it describes
    net, neuron = configuration.net_of(config, readable), configuration.neuron_of(config)
    forward = configuration.spikes_of(config, inputs.temporal)

    def apply(variables: dict[str, Any], images: Any) -> Output:
        x = prepare_images(images, inputs)
        return model.apply(net, variables, x, neuron=neuron, forward=forward)

    def initial() -> Any:
        x = prepare_images(jnp.zeros((1, *inputs.shape), jnp.uint8), inputs)
        return model.init_variables(net, jax.random.key(0), x, neuron)

    variables = jax.tree.map(jnp.asarray, variables)
    check_fits(variables, jax.eval_shape(initial), f"pretrained network {name!r}")
    return Pretrained(name, net, apply, variables["params"], variables["batch_stats"], config, inputs, card)


def inputs_of(stored: dict[str, Any]) -> Inputs:
    """`Inputs` back from JSON."""
    lists = ("classes", "shape", "mean", "std")
    fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in stored.items()}
    return Inputs(**fields)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys such as params/inject/kernel."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}{_SEPARATOR}") if isinstance(value, dict) else {name: value})
    return found


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """`flat`, undone."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        here = tree
        *folders, last = name.split(_SEPARATOR)
        for part in folders:
            here = here.setdefault(part, {})
        here[last] = value
    return tree
