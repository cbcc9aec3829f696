"""Progress on the screen: a live bar on a terminal, one plain line an interval everywhere else."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Protocol

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

ROOT_LOGGER = "mpisjax"


class Display(Protocol):
    """What the loop tells the screen."""

    def step(self, step: int, means: Mapping[str, float | None] | None, rate: float | None, *, due: bool) -> None:
        """Training has come to `step`: recent metrics, images a second, whether an interval ends here."""

    def say(self, sentence: str) -> None:
        """Shows a sentence that stays."""


class _Pace:
    """Seconds left, from the pace of this process since its first step (which compiles)."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None

    def left(self, step: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return None
        done, since = step - self._first[0], now - self._first[1]
        return since / done * (self._total - step) if done > 0 else None


def describe(means: Mapping[str, float | None], rate: float | None) -> str:
    """The metrics of an interval in one line: loss, accuracy, images/s, solver steps, residual."""

    def show(key: str, form: str, scale: float = 1.0) -> str:
        value = means.get(key)
        return "not finite" if value is None else form.format(value * scale)

    parts = [f"loss {show('loss', '{:.4f}')}", f"accuracy {show('accuracy', '{:.2f}%', 100.0)}"]
    if rate is not None:
        parts.append(f"{rate:,.0f} images/s")
    if "forward_steps" in means:
        parts.append(f"forward {show('forward_steps', '{:.3g}')} steps, residual {show('forward_residual', '{:.2g}')}")
    if "adjoint_steps" in means:
        parts.append(f"adjoint {show('adjoint_steps', '{:.3g}')} steps, residual {show('adjoint_residual', '{:.2g}')}")
    if means.get("skipped_steps"):
        parts.append(f"{show('skipped_steps', '{:.0f}')} skipped")
    return ", ".join(parts)


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class _Lines:
    def __init__(self, total: int, steps_per_epoch: int, stream: IO[str]) -> None:
        self._total, self._steps_per_epoch, self._stream = total, steps_per_epoch, stream
        self._pace = _Pace(total)
        self._shown = False

    def step(self, step: int, means: Mapping[str, float | None] | None, rate: float | None, *, due: bool) -> None:
        left = self._pace.left(step)
        if means is None or (self._shown and not due):
            return
        self._shown = True  # the first step is shown at once: it tells that compiling is over
        epoch = (step - 1) // self._steps_per_epoch + 1
        ahead = "" if left is None else f", {duration(left)} left"
        self.say(f"epoch {epoch}, step {step}/{self._total}: {describe(means, rate)}{ahead}")

    def say(self, sentence: str) -> None:
        print(sentence, file=self._stream, flush=True)


class _TwoLines(Progress):
    """A bar, and below it the metrics, which are too long to stand beside it."""

    metrics = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar's table, then the metrics."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.metrics)


class _Bar:
    def __init__(self, total: int, steps_per_epoch: int, console: Console, start: int) -> None:
        self._steps_per_epoch, self._epochs = steps_per_epoch, -(-total // steps_per_epoch)
        self._pace = _Pace(total)
        self._console = console
        self._rate: float | None = None  # measured over intervals, shown until the next
        self.progress = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("[cyan]{task.fields[left]} left"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self.progress.add_task("compiling", total=total, completed=start, left="-:--:--")

    def step(self, step: int, means: Mapping[str, float | None] | None, rate: float | None, *, due: bool) -> None:
        del due
        epoch = (step - 1) // self._steps_per_epoch + 1
        self._rate = self._rate if rate is None else rate
        if means is not None:
            self.progress.metrics = describe(means, self._rate)
        left = duration(self._pace.left(step))
        self.progress.update(self._task, completed=step, description=f"epoch {epoch}/{self._epochs}", left=left)

    def say(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, markup=False)


@contextlib.contextmanager
def display(total: int, steps_per_epoch: int, start: int = 0, stream: IO[str] | None = None) -> Iterator[Display]:
    """Shows progress on `stream` while the context lasts, and keeps the log from tearing the bar.

    Args:
        total: Steps of the whole run.
        steps_per_epoch: Steps of one epoch.
        start: Steps already taken.
        stream: Where to; standard output by default.

    Yields:
        What to tell about each step.
    """
    stream = stream or sys.stdout
    console = Console(file=stream)
    if not console.is_terminal:
        yield _Lines(total, steps_per_epoch, stream)
        return
    bar = _Bar(total, steps_per_epoch, console, start)
    with bar.progress, _log_through(console):
        yield bar


@contextlib.contextmanager
def _log_through(console: Console) -> Iterator[None]:
    """Sends what the log would print to a terminal through the console that draws the bar."""
    logger = logging.getLogger(ROOT_LOGGER)
    screens = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
    through = RichHandler(console=console, show_path=False, show_time=False)
    for handler in screens:
        logger.removeHandler(handler)
    logger.addHandler(through)
    try:
        yield
    finally:
        logger.removeHandler(through)
        for handler in screens:
            logger.addHandler(handler)
