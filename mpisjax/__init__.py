"""Spiking neural networks trained by their equilibrium (MPIS-SNNs), in JAX.

The idea is `equilibrium_forward`: a network written once as a transition, run as spikes or solved as rates, and
differentiated implicitly. Everything else in the package serves it.
"""

from mpisjax import cpu
from mpisjax.equilibrium import Equilibrium, adjoint_probe, equilibrium_forward
from mpisjax.errors import UserError
from mpisjax.neurons import IF, LIF, GradedIF, Neuron, TernaryIF, dbrelu
from mpisjax.pretrained import Trained, load, load_pretrained
from mpisjax.simulate import Simulation, SpikeForward, simulate
from mpisjax.solvers import Adjoint, AdjointStats, RateForward

__version__ = "0.1.0"
__all__ = [
    "IF",
    "LIF",
    "Adjoint",
    "AdjointStats",
    "Equilibrium",
    "GradedIF",
    "Neuron",
    "RateForward",
    "Simulation",
    "SpikeForward",
    "TernaryIF",
    "Trained",
    "UserError",
    "adjoint_probe",
    "cpu",
    "dbrelu",
    "equilibrium_forward",
    "load",
    "load_pretrained",
    "simulate",
]
