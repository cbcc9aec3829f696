"""Spiking neural networks trained by their equilibrium (MPIS-SNNs), in JAX.

The idea is `equilibrium_forward`: a network written once as a transition, run as spikes or solved as rates, and
differentiated implicitly. Everything else in the package serves it.
"""

from typing import TYPE_CHECKING, Any

from mpisjax import cpu
from mpisjax.equilibrium import Equilibrium, equilibrium_forward
from mpisjax.errors import UserError
from mpisjax.implicit import adjoint_probe
from mpisjax.neurons import IF, LIF, GradedIF, Neuron, TernaryIF, dbrelu
from mpisjax.pretrained import Trained, load, load_pretrained
from mpisjax.simulate import Simulation, SpikeForward, simulate
from mpisjax.solvers import Adjoint, AdjointStats, RateForward

if TYPE_CHECKING:
    from mpisjax.export.nir_import import from_nir
    from mpisjax.training.fit import fit
    from mpisjax.training.loop import StopTraining

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
    "StopTraining",
    "TernaryIF",
    "Trained",
    "UserError",
    "adjoint_probe",
    "cpu",
    "dbrelu",
    "equilibrium_forward",
    "fit",
    "from_nir",
    "load",
    "load_pretrained",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "from_nir":
        from mpisjax.export import nir_import

        return nir_import.from_nir
    if name not in ("fit", "StopTraining"):
        raise AttributeError(f"module 'mpisjax' has no attribute {name!r}")
    from mpisjax.training import fit, loop  # when first asked for: checkpoints take seconds to import

    return getattr(fit if name == "fit" else loop, name)
