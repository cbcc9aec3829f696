"""Watches a run's metrics for what a user must know: solvers that do not converge, steps without finite loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from mpisjax.errors import UserError

SOLVERS = ("forward", "adjoint")
_log = logging.getLogger(__name__)


class Diverged(UserError):
    """Training stopped because too many steps in a row were not finite."""


class Health:
    """Counts what goes wrong; warns at the first occurrence, and then once an epoch with counts.

    Args:
        max_skipped: Steps in a row that are not finite after which to stop; 0 to go on whatever comes.
    """

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped = max_skipped
        self._warned: set[str] = set()
        self._steps = 0
        self._failures = dict.fromkeys(SOLVERS, 0)
        self._worst = dict.fromkeys(SOLVERS, 0.0)
        self._skipped = 0
        self._last_residual = math.nan

    def look(self, rows: Sequence[dict[str, float]], step: int) -> None:
        """Looks at the metrics of some steps, the last of which is number `step`.

        Raises:
            Diverged: `max_skipped` steps in a row were not finite.
        """
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            self._steps += 1
            for solver in SOLVERS:
                if row.get(f"{solver}_converged", 1.0) < 1.0:
                    self._count(solver, row[f"{solver}_residual"], number)
            if row["finite"] < 0.5:
                self._skipped += 1
                if self._skipped == 1:
                    _log.warning("step %d gave a loss or gradient that is not finite; it is skipped", number)
            elif "forward_residual" in row:
                self._last_residual = row["forward_residual"]
            if self._max_skipped and row["skipped"] >= self._max_skipped:
                raise Diverged(self._diagnosis(row, number))

    def end_epoch(self, epoch: int) -> None:
        """Reports an epoch's counts and starts anew."""
        for solver in SOLVERS:
            if self._failures[solver]:
                _log.warning(
                    "epoch %d: the %s solver did not converge in %d of %d steps (largest residual %.2g)",
                    epoch, solver, self._failures[solver], self._steps, self._worst[solver],
                )  # fmt: skip
        if self._skipped:
            _log.warning(
                "epoch %d: %d of %d steps were not finite and were skipped", epoch, self._skipped, self._steps
            )
        self._steps, self._skipped = 0, 0
        self._failures = dict.fromkeys(SOLVERS, 0)
        self._worst = dict.fromkeys(SOLVERS, 0.0)

    def _count(self, solver: str, residual: float, step: int) -> None:
        self._failures[solver] += 1
        self._worst[solver] = max(self._worst[solver], residual)
        if solver not in self._warned:
            self._warned.add(solver)
            _log.warning(
                "step %d: the %s solver has not converged (residual %.2g); from here on this is told once an epoch",
                step, solver, residual,
            )  # fmt: skip

    def _diagnosis(self, row: dict[str, float], step: int) -> str:
        return (
            f"training stopped at step {step}: {row['skipped']:.0f} steps in a row gave a loss or gradient that is not "
            f"finite (learning rate {row['learning_rate']:.3g}, last finite forward residual {self._last_residual:.2g}); "
            "lower config.train.learning_rate, or raise the damping of the solvers"
        )
