"""Training steps on a GPU: precisions, time steps and networks, beside what the chip's products and memory allow.

The points are taken in the order of their worth, and none is begun after `SECONDS`, so that one command within eight
minutes fills as much of the table as that chip can.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.nets import Subject, case
from benchmarks.sections import Rows, trips
from benchmarks.timing import Compiled, compiled_together, measure
from mpisjax.nn.flops import Counter

SECONDS = 390  # what runs then, and the peer, take less than a minute and a half


class Precision(NamedTuple):
    """How numbers are held and multiplied.

    Attributes:
        title: Its name in tables.
        dtype: Of currents and rates.
        products: Of float32 products, as `jax.default_matmul_precision` has it; "default" takes TF32 where there is
            any.
    """

    title: str
    dtype: str
    products: str


PRECISIONS = (
    Precision("float32, TF32 on", "float32", "default"),
    Precision("bfloat16", "bfloat16", "default"),
    Precision("float32, TF32 off", "float32", "highest"),
)
NETWORKS = (("fashion", 128), ("cifar100", 128), ("cifar100", 512))
MODES: tuple[int | str, ...] = ("rates", 30, 1, 100, 5)
# Of a dry run: one stream of few channels.
TINY: dict[str, dict[str, Any]] = {
    "fashion": {"num_streams": 1, "stem": (4,), "layers": (4, 4)},
    "cifar100": {"num_streams": 1, "stem": (4, 4), "layers": (4, 4, 4)},
}


class Group(NamedTuple):
    """Points that share a network, its batch and a precision."""

    precision: Precision
    network: str
    batch_size: int
    modes: tuple[int | str, ...]


def groups(quick: bool = False) -> list[Group]:
    """All points, in the order of their worth; `quick`: one of each tiny network."""
    if quick:
        return [Group(PRECISIONS[0], "fashion", 2, ("rates",)), Group(PRECISIONS[1], "cifar100", 2, (2,))]
    return [Group(one, name, size, MODES) for one, (name, size) in itertools.product(PRECISIONS, NETWORKS)]


class Peaks(NamedTuple):
    """What the chip does at best: operations a second, by precision, and bytes a second."""

    operations: dict[str, float]
    bandwidth: float


def measure_peaks(quick: bool = False) -> Peaks:
    """Measures a large matrix product in each precision, and an addition to a large array."""
    side, size = (128, 1 << 16) if quick else (8192, 1 << 28)
    operations, products = {}, 4
    for precision in PRECISIONS:
        a = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(precision.dtype)) / side**0.5
        with jax.default_matmul_precision(precision.products):
            chain: Any = jax.jit(lambda a: jax.lax.fori_loop(0, products, lambda _, x: x @ a, a))
            fastest = measure(lambda chain=chain, a=a: chain(a)).fastest
        operations[precision.title] = products * 2 * side**3 / fastest
    moved = jnp.zeros(size, jnp.float32)
    add: Any = jax.jit(lambda x: x + 1)
    return Peaks(operations, 2 * moved.nbytes / measure(lambda: add(moved)).fastest)


def rows_of(peaks: Peaks) -> Rows:
    """The peaks as a table."""
    products = [{"what": f"matrix product, {name}", "TFLOP/s": v / 1e12} for name, v in peaks.operations.items()]
    return [*products, {"what": "memory", "TB/s": peaks.bandwidth / 1e12}]


class Roofline(Counter):
    """Counts the seconds that convolutions and products need at least, in place of their operations.

    Each needs its operations at the peak of products, or its operands and result, moved once, at that of memory. All
    other operations are taken to be fused into these.
    """

    def __init__(self, turns: list[float], operations: float, bandwidth: float) -> None:
        super().__init__(turns)
        self._rates = operations, bandwidth

    def _equation(self, eqn: Any) -> float:
        found = super()._equation(eqn)
        if eqn.primitive.name not in ("conv_general_dilated", "dot_general"):
            return found
        moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars))
        return max(found / self._rates[0], moved / self._rates[1])


def measure_steps(peaks: Peaks, *, quick: bool = False, seconds: float = SECONDS) -> Iterator[Rows]:
    """Yields the rows of a group as soon as they are measured.

    Args:
        peaks: What to compare with.
        quick: A dry run.
        seconds: No point is begun after that.
    """
    ends = time.monotonic() + seconds
    for group in groups(quick):
        shared = {"precision": group.precision.title, "batch": group.batch_size}
        late = [{"net": group.network, **shared, "forward": mode, "seconds": "not reached"} for mode in group.modes]
        if time.monotonic() > ends:
            yield late
            continue
        size = TINY[group.network] if quick else {}
        c = case(group.network, batch_size=group.batch_size, dtype=group.precision.dtype, **size)
        subject = Subject(c, num_devices=1, warmup=0)
        with jax.default_matmul_precision(group.precision.products):
            steps = [subject.train_step(mode) for mode in group.modes]
            made = compiled_together([(step, subject.step_arguments()) for step in steps])
            rows: Rows = []
            for mode, step, c_step, missed in zip(group.modes, steps, made, late, strict=True):
                if time.monotonic() > ends:
                    rows.append(missed | {"net": c.title})
                    continue
                try:
                    point = _point(subject, mode, step, c_step, peaks, group.precision.title)
                except jax.errors.JaxRuntimeError as error:  # out of memory, say
                    point = {"seconds": str(error).partition("\n")[0][:60]}
                rows.append({"net": c.title, **shared, "forward": mode, **point})
        yield rows


def _point(s: Subject, mode: int | str, step: Any, made: Compiled, peaks: Peaks, precision: str) -> dict[str, Any]:
    for _ in range(3 if mode == "rates" else 0):  # the running statistics settle, as before every measurement here
        s.state, _ = made.call(*s.step_arguments())
    timing = measure(made.call, s.step_arguments, repeats=10, budget=4.0)
    _, metrics = made.call(*s.step_arguments())
    turns = trips(mode, float(metrics.forward_steps), float(metrics.adjoint_steps))
    jaxpr = jax.make_jaxpr(step)(*s.step_arguments()).jaxpr
    speed = Counter(turns).count(jaxpr) / timing.seconds
    least = Roofline(turns, peaks.operations[precision], peaks.bandwidth).count(jaxpr)
    return {
        "seconds": timing.seconds,
        "images/s": s.case.config.train.batch_size / timing.seconds,
        "TFLOP/s": speed / 1e12,
        "of_peak": speed / peaks.operations[precision],
        "of_roofline": least / timing.seconds,
        "temporary_MiB": made.temporary / 2**20,
        "forward_steps": float(metrics.forward_steps),
        "adjoint_steps": float(metrics.adjoint_steps),
    }


def about() -> dict[str, Any]:
    """What a table of a GPU's has to say beside the machine: driver and runtime, and the commit."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    runtime = " ".join(jax.devices()[0].client.platform_version.split())
    return {"runtime": runtime, "commit": told.stdout.strip() or "not known"}
