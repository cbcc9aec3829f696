"""Small MPIS networks with every parameter and running statistic random, for tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpisjax
from mpisjax import nn

NEURON = mpisjax.IF()


def random_variables(net: nn.MPIS, images: Any, seed: int, gain: float = 0.5) -> dict[str, Any]:
    """Variables away from their initial values, small enough for the map to contract.

    `gain` scales batch normalisation's scales; running variances are drawn so that currents are of order 1.
    """
    rng = np.random.default_rng(seed)
    variables = jax.eval_shape(lambda i: nn.init_variables(net, jax.random.key(0), i, NEURON), images)

    def draw(path: Any, leaf: Any) -> Any:
        name, module = path[-1].key, path[1].key
        if name in ("kernel", "direction"):
            scale = 0.3 if module == "classifier" else 1.0
            value = scale * rng.normal(size=leaf.shape)
        else:
            low, high = {
                "gain": (0.3, 0.7),
                "scale": (0.6 * gain, 1.4 * gain),
                "bias": (-0.1, 0.3),
                "mean": (-0.2, 0.2),
                "var": (0.2, 1.0),
                "log_threshold": (-0.4, 0.4),
            }["log_threshold" if name.startswith("log_threshold") else name]
            value = rng.uniform(low, high, size=leaf.shape)
        return jnp.asarray(value, jnp.result_type(float))

    return jax.tree_util.tree_map_with_path(draw, variables)


def random_images(seed: int, *shape: int) -> jax.Array:
    """Pixels, standardised: float [*shape]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))
