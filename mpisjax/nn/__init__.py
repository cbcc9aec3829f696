"""The MPIS network in Flax (linen), and the convolutions under it."""

from mpisjax.nn.model import Output, apply, init_variables, parameter_count, spikes, transition_of
from mpisjax.nn.mpis import MPIS, sample_masks
from mpisjax.nn.network import Network, as_module

__all__ = [
    "MPIS",
    "Network",
    "Output",
    "apply",
    "as_module",
    "init_variables",
    "parameter_count",
    "sample_masks",
    "spikes",
    "transition_of",
]
