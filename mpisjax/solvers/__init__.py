"""Solvers for the equilibrium and for its adjoint.

Each is written for one sample and run for every one (`mpisjax.solvers.samples`): a sample that diverges, or is not a
number, leaves the others as they are alone.
"""

from mpisjax.solvers.adjoint import AdjointStats, solve_adjoint
from mpisjax.solvers.fixed_point import FixedPoint, solve_rates
from mpisjax.solvers.options import Adjoint, RateForward

__all__ = ["Adjoint", "AdjointStats", "FixedPoint", "RateForward", "solve_adjoint", "solve_rates"]
