"""A trained network as one object: what it reads, how it answers, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from mpisjax.errors import UserError
from mpisjax.pretrained.inputs import Inputs, as_pixels, without_examples

if TYPE_CHECKING:
    import ml_collections

    from mpisjax.neurons import LIF
    from mpisjax.nn import MPIS
    from mpisjax.nn.model import Output
    from mpisjax.nn.network import Variables
    from mpisjax.pretrained.familiar import Familiar
    from mpisjax.pretrained.predict import Prediction
    from mpisjax.simulate import SpikeForward


class Trained(NamedTuple):
    """A trained network: what `mpisjax.load` and `mpisjax.load_pretrained` give.

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
    params: PyTree
    batch_stats: PyTree
    config: ml_collections.ConfigDict
    inputs: Inputs
    card: dict[str, Any]

    @property
    def variables(self) -> Variables:
        """Parameters and running statistics, as `apply` and `mpisjax.nn` take them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.inputs.classes

    @property
    def familiar(self) -> Familiar | None:
        """What the training data look like to the network; None of networks that older versions wrote."""
        from mpisjax.pretrained.familiar import Familiar

        card = self.card.get("familiar")
        return Familiar.from_card(card) if card else None

    def predict(
        self,
        images: ArrayLike | str | Path | Sequence[str | Path],
        *,
        value_range: tuple[float, float] | None = None,
        num_steps: int | None = None,
        confidence: float | None = None,
        batch_size: int = 256,
    ) -> Prediction:
        """Names the class of each image.

        Args:
            images: One image or many: uint8 of `inputs.shape`, with or without an axis of examples before it; any other
                dtype with `value_range`. The channel axis of grey images may be left out. Or the path of an image file,
                or a sequence of paths; such images are brought to the network's size.
            value_range: The pixel values of black and of white, such as (0, 1). None: 0 and 255, of uint8 alone.
            num_steps: Time steps; None: as many as the network was trained for. Frames bring their own number.
            confidence: In (0, 1]: stop at the first time step whose answer, by spikes alone, is this sure. None: take
                all steps, and answer as the network was trained to (by the equivalent path as a rule).
            batch_size: Examples at once.

        Returns:
            The `Prediction`: for each image its class, all probabilities, spikes and steps used, and how unlike the
            training data it is.

        Raises:
            UserError: The network cannot read the images, or a file is missing or no image.
        """
        from mpisjax.configuration import makers
        from mpisjax.pretrained.predict import predict

        if num_steps is not None and (self.inputs.temporal or num_steps < 1):
            why = "frames bring their own number" if self.inputs.temporal else "a simulation needs at least 1"
            raise UserError(f"num_steps is {num_steps}: leave it out, {why}")
        return predict(
            self,
            images,
            forward=makers.make_spike_forward(self.config, self.inputs.temporal, num_steps),
            through_time=makers.make_bptt(self.config),
            confidence=confidence,
            value_range=value_range,
            batch_size=batch_size,
            fit=self.config.data.fit,
        )

    def save(self, path: str | Path, note: str = "") -> Path:
        """Writes the network as PATH.safetensors with its card PATH.json, which `mpisjax.load(PATH)` reads.

        Args:
            path: A name in a folder, such as "networks/mine"; the folder is made if it is missing.
            note: Anything worth knowing, for the card.

        Returns:
            The path of the weights.

        Raises:
            UserError: The name is taken, or the folder cannot be written.
        """
        from mpisjax.pretrained.files import write

        return write(self.variables, self.card, path, note)


def from_variables(
    name: str,
    config: ml_collections.ConfigDict,
    inputs: Inputs,
    variables: Any,
    card: dict[str, Any],
    network: Any = None,
) -> Trained:
    """Makes a `Trained` from its settings and its weights.

    Args:
        name: Its name.
        config: Its settings.
        inputs: What it reads.
        variables: `{"params": ..., "batch_stats": ...}`.
        card: How it was made.
        network: The network; None: what the settings say.

    Raises:
        UserError: The weights are another network's, or no settings say what the network is.
    """
    from mpisjax import weights
    from mpisjax.configuration import makers
    from mpisjax.data import prepare_images
    from mpisjax.nn import as_module, model

    if network is None and not config.model.name:
        raise UserError(f"no settings say what the network of {name} is: give it, mpisjax.load(..., network=...)")
    net = makers.make_network(config, without_examples(inputs)) if network is None else as_module(network)
    neuron = makers.make_neuron(config)
    forward = makers.make_spike_forward(config, inputs.temporal)

    def apply(variables: dict[str, Any], images: Any, value_range: tuple[float, float] | None = None) -> Output:
        x = prepare_images(as_pixels(images, inputs, value_range), inputs)
        return model.apply(net, variables, x, neuron=neuron, forward=forward)

    def initial() -> Any:
        x = prepare_images(jnp.zeros((1, *inputs.shape), jnp.uint8), inputs)
        return model.init_variables(net, jax.random.key(0), x, neuron)

    variables = jax.tree.map(jnp.asarray, variables)
    with jax.enable_x64(False):  # the weights are float32, whatever the program's own precision
        weights.check_fit(variables, jax.eval_shape(initial), f"network {name!r}")
    return Trained(
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
