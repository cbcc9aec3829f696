"""Pure-spike inference as one StableHLO program, weights included, that runs with JAX alone.

The file is what `jax.export` serialises: StableHLO with its calling convention, for CPU, CUDA and TPU at once
and for any batch size. `jax.export.deserialize(data).call(images)` runs it; see docs/export.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from mpisjax import cpu
from mpisjax.data import prepare_images
from mpisjax.nn import model
from mpisjax.pretrained import Trained

Array = jax.Array
PLATFORMS = ("cpu", "cuda", "tpu")


def inference(trained: Trained, num_steps: int | None = None) -> Any:
    """Pure-spike inference as a function of images alone.

    Args:
        trained: The network.
        num_steps: Time steps; None: as trained. Input over time has as many as frames.

    Returns:
        `infer(images)`: uint8 [batch, *inputs.shape] -> a dict of `scores`, float32 [batch, classes], the
        softmax of the classifier on the spikes' own rates; `spike_counts`, int32 [batch] by population; and
        `num_steps`, int32 [batch].
    """
    net, neuron, inputs, variables = trained.net, trained.neuron, trained.inputs, trained.variables
    forward = trained.forward
    if num_steps is not None:
        forward = dataclasses.replace(forward, num_steps=num_steps)

    def infer(images: Array) -> dict[str, Any]:
        x = prepare_images(images, inputs)
        simulation = model.spikes(net, variables, x, neuron=neuron, forward=forward)
        scores = jax.nn.softmax(model.classify(net, variables, simulation.rates))
        counts = {
            name: jnp.sum(spikes, axis=tuple(range(1, spikes.ndim))).astype(jnp.int32)
            for name, spikes in simulation.spike_counts.items()
        }
        return {"scores": scores, "spike_counts": counts, "num_steps": simulation.num_steps}

    return infer


def to_stablehlo(trained: Trained, num_steps: int | None = None, *, batch_size: int | None = None) -> bytearray:
    """Serialises pure-spike inference.

    Args:
        trained: The network; its weights become constants of the program.
        num_steps: Time steps; None: as trained.
        batch_size: Of the images; None: any.

    Returns:
        The bytes that `jax.export.deserialize` takes.
    """
    batch = export.symbolic_shape("batch")[0] if batch_size is None else batch_size
    images = jax.ShapeDtypeStruct((batch, *trained.inputs.shape), jnp.uint8)
    with cpu.disabled():  # the file is to run on other machines
        exported = export.export(jax.jit(inference(trained, num_steps)), platforms=PLATFORMS)(images)
    return exported.serialize()
