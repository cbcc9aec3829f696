"""What a solve is asked for: which solver, how far, how long."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpisjax.errors import UserError

_FORWARD = ("picard", "anderson")
KRYLOV = ("gmres", "bicgstab", "normal_cg")
_ADJOINT = ("neumann", "anderson", *KRYLOV, "phantom")


def _check(section: str, value: Any, solvers: tuple[str, ...], least_steps: int) -> None:
    if value.solver not in solvers:
        raise UserError(f"{section}.solver is {value.solver!r}: choose one of {', '.join(solvers)}.")
    if value.max_steps < least_steps:
        raise UserError(f"{section}.max_steps is {value.max_steps}: set it to at least {least_steps}.")
    if not value.tol >= 0:
        raise UserError(f"{section}.tol is {value.tol}: set it to 0 or more.")
    if value.history < 2:
        raise UserError(f"{section}.history is {value.history}: Anderson and GMRES need at least 2.")
    if not 0 <= value.damping < 1:
        raise UserError(f"{section}.damping is {value.damping}: set it in [0, 1).")


@dataclasses.dataclass(frozen=True)
class RateForward:
    """Find the equilibrium by solving r = f(r) with the rate reading.

    Attributes:
      solver: "picard" (fixed-point iteration) or "anderson".
      max_steps: most evaluations of f, >= 1.
      tol: a sample stops when each of its streams has a relative residual ||f(r) - r|| / ||f(r)|| of at most
        this; 0 takes `max_steps` steps. No stream stops before the others: they feed each other, so a stream that
        has settled moves again while another one moves.
      history: iterates that Anderson mixes.
      damping: in [0, 1): solve with r <- damping * r + (1 - damping) * f(r), which can settle a map that
        overshoots.

    Raises:
      UserError: a value is outside its range.
    """

    solver: str = "picard"
    max_steps: int = 30
    tol: float = 1e-3
    history: int = 3
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check("forward", self, _FORWARD, 1)


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """How the backward pass solves (I - J^T) v = g (Eq. 5 and 8).

    Attributes:
      solver: "neumann" (v <- g + J^T v), "anderson", "gmres", "bicgstab", "normal_cg", or "phantom": exactly
        `max_steps` Neumann steps whatever the residual; 0 of them give the one-step gradient v = g.
      max_steps: most products with J^T (for "gmres", "bicgstab" and "normal_cg": most solver iterations).
      tol: a sample stops when ||g - (I - J^T) v|| <= tol * ||g||, over its streams.
      history: iterates that Anderson mixes; Krylov vectors of GMRES between restarts.
      damping: in [0, 1), of "neumann", "anderson" and "phantom": v <- damping * v + (1 - damping) * (g + J^T v).
        J^T has J's eigenvalues, so what settles an overshooting forward settles its adjoint.

    Raises:
      UserError: a value is outside its range.
    """

    solver: str = "neumann"
    max_steps: int = 30
    tol: float = 1e-3
    history: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check("adjoint", self, _ADJOINT, 0 if self.solver == "phantom" else 1)
        if self.damping and self.solver in KRYLOV:
            raise UserError(
                f"adjoint.damping is {self.damping} but adjoint.solver is {self.solver!r}, which has none: set it to "
                "0, or the solver to 'neumann', 'anderson' or 'phantom'."
            )
