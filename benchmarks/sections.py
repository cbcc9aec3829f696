"""What is measured. Each section returns rows (dicts) for tables and plots."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from benchmarks import peaks, profile
from benchmarks.nets import Subject, case
from benchmarks.timing import Compiled, Timing, compiled, measure
from mpisjax.nn import flops
from mpisjax.training.devices import data_mesh

Rows = list[dict[str, Any]]


class Scope(NamedTuple):
    """How much to measure.

    Attributes:
        quick: Fewer points, for a look or a test.
        repeats: The most timed calls of a point.
        budget: Seconds after which a point's calls end (three are always timed).
        dtype: Of currents and rates.
    """

    quick: bool
    repeats: int
    budget: float
    dtype: str

    @property
    def cases(self) -> tuple[str, ...]:
        """Networks."""
        return ("f64c5", "fashion")

    @property
    def modes(self) -> tuple[int | str, ...]:
        """Forwards: numbers of spiking time steps, and rates."""
        return (5, "rates") if self.quick else (1, 5, 30, 100, 300, "rates")

    def spend(self, share: float = 1.0) -> dict[str, Any]:
        """Arguments of `measure`."""
        return {"repeats": self.repeats, "budget": share * self.budget, "least": 2 if self.quick else 3}


@functools.cache
def subject(scope: Scope, name: str) -> Subject:
    """A network in the state it is measured in. Sections share it, since making it takes seconds."""
    return Subject(case(name, dtype=scope.dtype), warmup=3 if scope.quick else 10)


def trips(mode: int | str, forward_steps: float, adjoint_steps: float) -> list[float]:
    """Trip counts of the loops with convolutions in a training step (a simulation's is in the program)."""
    return [forward_steps, adjoint_steps] if mode == "rates" else [adjoint_steps]


def measure_peaks(scope: Scope) -> Rows:
    """The speed of convolutions and of a matrix product."""
    mesh = data_mesh(64)
    found = peaks.measure_peaks(mesh, jnp.dtype(scope.dtype), repeats=3 if scope.quick else 9)
    return [{"what": p.title, "GFLOP/s": p.gflops, "devices": mesh.size} for p in found]


def convolution_peak(rows: Rows) -> float:
    """The fastest convolution of `measure_peaks`, in GFLOP/s."""
    return max(row["GFLOP/s"] for row in rows if row["what"].startswith("conv"))


def _step_row(
    s: Subject, what: str, mode: int | str, timing: Timing, c: Compiled, work: float, peak: float, took: Any
) -> dict[str, Any]:
    speed = work / timing.seconds / 1e9
    return {
        "net": s.case.title,
        "what": what,
        "forward": mode,
        "batch": s.case.config.train.batch_size,
        "seconds": timing.seconds,
        "cpu_seconds": timing.cpu,
        "repeats": timing.repeats,
        **took,
        "GFLOP": work / 1e9,
        "GFLOP/s": speed,
        "of_peak": speed / peak,
        "trace_seconds": c.trace_seconds,
        "compile_seconds": c.compile_seconds,
        "temporary_MiB": c.temporary / 2**20,
        "arguments_MiB": c.arguments / 2**20,
    }


def measure_steps(scope: Scope, peak: float) -> Rows:
    """The time of training steps and inferences against the number of time steps."""
    rows = []
    for name in scope.cases:
        s = subject(scope, name)
        for mode in scope.modes:
            step = s.train_step(mode)
            c = compiled(step, *s.step_arguments())
            timing = measure(c.call, s.step_arguments, **scope.spend())
            _, metrics = c.call(*s.step_arguments())
            forward, adjoint = float(metrics.forward_steps), float(metrics.adjoint_steps)
            work = flops.count(step, *s.step_arguments(), trips=trips(mode, forward, adjoint))
            took = {"forward_steps": forward, "adjoint_steps": adjoint}
            rows.append(_step_row(s, "training step", mode, timing, c, work, peak, took))
            run = s.inference(mode)
            arguments = s.variables(), s.batch
            c = compiled(run, *arguments)
            timing = measure(lambda c=c, a=arguments: c.call(*a), **scope.spend(0.5))
            steps = float(c.call(*arguments)[1])
            work = flops.count(run, *arguments, trips=[steps])
            rows.append(_step_row(s, "inference", mode, timing, c, work, peak, {"forward_steps": steps}))
    return rows


def measure_memory(scope: Scope) -> Rows:
    """Memory of the compiled training step against time steps and the solvers' history; nothing is run."""
    rows = []
    lengths = (1, 1000) if scope.quick else (1, 5, 30, 100, 300, 1000)
    histories = (5,) if scope.quick else (2, 5, 10)
    anderson = {"forward.solver": "anderson", "adjoint.solver": "anderson"}
    for name in scope.cases[:1] if scope.quick else scope.cases:
        s = subject(scope, name)
        points: list[tuple[int | str, str, dict[str, Any]]] = [(t, "neumann", {}) for t in lengths]
        points.append(("rates", "picard, neumann", {}))
        for h in histories:
            history = {"forward.history": h, "adjoint.history": h}
            points.append(("rates", f"anderson, history {h}", {**anderson, **history}))
        for mode, solver, settings in points:
            c = compiled(s.train_step(mode, **settings), *s.step_arguments())
            rows.append(
                {
                    "net": s.case.title,
                    "forward": mode,
                    "solver": solver,
                    "temporary_MiB": c.temporary / 2**20,
                    "arguments_MiB": c.arguments / 2**20,
                }
            )
    return rows


def fixed_step(s: Subject, forward: int, adjoint: int, mode: int | str = "rates") -> Any:
    """A training step whose solves take all the steps that they are allowed."""
    settings = {
        "forward.max_steps": forward,
        "forward.tol": 0.0,
        "adjoint.max_steps": adjoint,
        "adjoint.tol": 0.0,
    }
    return s.train_step(mode, **settings)


def measure_adjoint(scope: Scope) -> Rows:
    """The time of one adjoint iteration beside that of one evaluation of f in the forward solve.

    Both are slopes of the time of a whole step, from 4 to 12 iterations of a solve that never stops early.
    """
    rows, (few, many) = [], (4, 12)
    for name in scope.cases[:1] if scope.quick else scope.cases:
        s = subject(scope, name)
        base = measure(fixed_step(s, few, few), s.step_arguments, **scope.spend())
        forward = measure(fixed_step(s, many, few), s.step_arguments, **scope.spend())
        adjoint = measure(fixed_step(s, few, many), s.step_arguments, **scope.spend())

        def slope(other: Any, kind: str, base: Any = base) -> float:
            return (getattr(other, kind) - getattr(base, kind)) / (many - few)

        rows.append(
            {
                "net": s.case.title,
                "forward_seconds": slope(forward, "seconds"),
                "adjoint_seconds": slope(adjoint, "seconds"),
                "ratio": slope(adjoint, "seconds") / slope(forward, "seconds"),
                "cpu_ratio": slope(adjoint, "cpu") / slope(forward, "cpu"),
            }
        )
    return rows


def measure_solvers(scope: Scope) -> Rows:
    """The steps that each solver needs for each tolerance, on the same state."""
    rows = []
    tolerances = (1e-2,) if scope.quick else (1e-1, 1e-2, 1e-3, 1e-4)
    for name in scope.cases[1:] if scope.quick else scope.cases:
        s = subject(scope, name)
        for solver in ("picard", "anderson"):
            for tol in tolerances:
                settings = {"forward.solver": solver, "forward.tol": tol, "forward.max_steps": 60}
                settings |= {"adjoint.solver": "neumann" if solver == "picard" else "anderson"}
                settings |= {"adjoint.tol": tol, "adjoint.max_steps": 60}
                _, metrics = s.train_step("rates", **settings)(*s.step_arguments())
                rows.append(
                    {
                        "net": s.case.title,
                        "solver": "picard, neumann" if solver == "picard" else "anderson, anderson",
                        "tolerance": tol,
                        "forward_steps": float(metrics.forward_steps),
                        "forward_residual": float(metrics.forward_residual),
                        "adjoint_steps": float(metrics.adjoint_steps),
                        "adjoint_residual": float(metrics.adjoint_residual),
                    }
                )
    return rows


def measure_profile(scope: Scope) -> dict[str, Rows]:
    """The time of a training step by kind of operation, and the most expensive operations."""
    found = {}
    for name in scope.cases:
        s = subject(scope, name)
        for mode in ("rates",) if scope.quick else ("rates", 30):
            c = compiled(s.train_step(mode), *s.step_arguments())
            measure(c.call, s.step_arguments, repeats=1, least=1)
            operations = profile.profile(c.call, s.step_arguments, s.mesh.size)
            kinds = profile.by_kind(operations)
            rows = [{"operation": f"all: {k}", "ms": 1e3 * v} for k, v in sorted(kinds.items())]
            for o in operations[:15]:
                rows.append(
                    {
                        "operation": f"{o.name} ({o.kind})",
                        "ms": 1e3 * o.seconds,
                        "runs": o.runs,
                        "inside": o.inside,
                    }
                )
            found[f"{s.case.title}, {'rates' if mode == 'rates' else f'T = {mode}'}"] = rows
    return found
