"""Watches a run's metrics for what a user must know: solvers that do not converge, steps without finite loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from mpisjax.errors import UserError

SOLVERS = ("forward", "adjoint")
_log = logging.getLogger(__name__)


class DivergenceError(UserError):
    """Training stopped because too many steps in a row were not finite."""


class DivergenceMonitor:
    """Counts what goes wrong; warns at the first occurrence, and then once an epoch with counts.

    Args:
        max_skipped: Steps in a row that are not finite after which to stop.
        adjoint_tol: The relative residual up to which the adjoint solve counts as converged; None for no limit.
    """

    def __init__(self, max_skipped: int, adjoint_tol: float | None = None) -> None:
        self._max_skipped, self._adjoint_tol = max_skipped, adjoint_tol
        self._warned: set[str] = set()
        self._last_residual = math.nan
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._steps, self._skipped = 0, 0
        self._failures = dict.fromkeys(SOLVERS, 0)
        self._worst = dict.fromkeys(SOLVERS, 0.0)

    def look(self, rows: Sequence[dict[str, float]], step: int) -> None:
        """Looks at the metrics of some steps, the last of which is number `step`.

        Raises:
            DivergenceError: `max_skipped` steps in a row were not finite.
        """
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            self._steps += 1
            if row.get("forward_converged", 1.0) < 1.0:
                self._count("forward", row["forward_residual"], number)
            if self._adjoint_tol is not None and not row["adjoint_residual"] <= self._adjoint_tol:
                self._count("adjoint", row["adjoint_residual"], number)
            if row["finite"] < 0.5:
                self._skipped += 1
                if self._skipped == 1:
                    _log.warning("step %d gave a loss or gradient that is not finite; it is skipped", number)
            elif "forward_residual" in row:
                self._last_residual = row["forward_residual"]
            if row["skipped"] >= self._max_skipped:
                raise DivergenceError(self._diagnosis(row, number))

    def end_epoch(self, epoch: int) -> None:
        """Reports an epoch's counts and starts anew."""
        for solver in SOLVERS:
            if self._failures[solver]:
                _log.warning(
                    "epoch %d: the %s solver did not converge for every sample in %d of %d steps "
                    "(largest residual %.2g)",
                    epoch, solver, self._failures[solver], self._steps, self._worst[solver],
                )  # fmt: skip
        if self._skipped:
            _log.warning(
                "epoch %d: %d of %d steps were not finite and were skipped", epoch, self._skipped, self._steps
            )
        self._start_epoch()

    def _count(self, solver: str, residual: float, step: int) -> None:
        self._failures[solver] += 1
        self._worst[solver] = max(self._worst[solver], residual)
        if solver not in self._warned:
            self._warned.add(solver)
            _log.warning(
                "step %d: the %s solver has not converged for every sample (residual %.2g); "
                "from here on this is told once an epoch",
                step, solver, residual,
            )  # fmt: skip

    def _diagnosis(self, row: dict[str, float], step: int) -> str:
        return (
            f"training stopped at step {step}: {row['skipped']:.0f} steps in a row gave a loss or gradient that "
            f"is not finite (learning rate {row['learning_rate']:.3g}, last finite forward residual "
            f"{self._last_residual:.2g})"
        )
