"""The MPIS network in Flax (linen), and the convolutions under it."""

from mpisjax.nn.model import Output, apply, init_variables, parameter_count, spikes, transition_of
from mpisjax.nn.mpis import MPIS, sample_masks

__all__ = [
    "MPIS",
    "Output",
    "apply",
    "init_variables",
    "parameter_count",
    "sample_masks",
    "spikes",
    "transition_of",
]
