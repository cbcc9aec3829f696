"""Progress on the screen: one line an epoch, and on a terminal a live bar below it."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

ROOT_LOGGER = "mpisjax"
SECONDS = 60.0  # without a terminal, an epoch that is longer has a line so often
Means = Mapping[str, float | None]


def describe(means: Means, rate: float | None, validation: str = "") -> str:
    """Loss, accuracy, validation and images/s in one line, and how many steps were skipped if any were."""
    parts = [f"loss {_show(means, 'loss', '{:.4f}')}", f"accuracy {_show(means, 'accuracy', '{:.2%}')}"]
    parts += [validation] if validation else []
    parts += [f"{rate:,.0f} images/s"] if rate is not None else []
    parts += [f"{means['skipped_steps']:.0f} skipped"] if means.get("skipped_steps") else []
    return ", ".join(parts)


def solves(means: Means) -> str:
    """The steps of both solvers and their residuals."""
    return "; ".join(
        f"{solver} {_show(means, f'{solver}_steps', '{:.3g}')} steps, residual "
        + _show(means, f"{solver}_residual", "{:.2g}")
        for solver in ("forward", "adjoint")
        if f"{solver}_steps" in means
    )


def _show(means: Means, key: str, form: str) -> str:
    value = means.get(key)
    return "not finite" if value is None else form.format(value)


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _mean(values: list[tuple[int, float | None]]) -> float | None:
    """The mean of values that stand for so many steps each; None where all are None."""
    known = [(steps, value) for steps, value in values if value is not None]
    return sum(n * value for n, value in known) / sum(n for n, _ in known) if known else None


class Display:
    """What the loop tells the screen, and the line of an epoch, from the intervals in it."""

    def __init__(self, total: int, steps_per_epoch: int, start: int) -> None:
        self._total, self._steps_per_epoch, self._epochs = total, steps_per_epoch, -(-total // steps_per_epoch)
        self._step = self._counted = start
        self._first: tuple[int, float] | None = None  # this process's first step, which compiles, and when it ended
        self._left: float | None = None  # seconds, from the pace since then
        self._intervals: list[tuple[int, Means, float | None]] = []  # steps, means, images a second

    def step(self, step: int, means: Means | None, rate: float | None, *, due: bool) -> None:
        """Training has come to `step`: recent metrics, images a second, whether an interval ends here."""
        self._step, now = step, time.monotonic()
        self._first = self._first or (step, now)
        done = step - self._first[0]
        self._left = (now - self._first[1]) / done * (self._total - step) if done > 0 else None
        if due and means is not None:
            self._intervals.append((step - self._counted, means, rate))
            self._counted = step

    def epoch(self, validation: str) -> None:
        """The epoch ends with this step and has been validated, if it is to be: with what outcome, in words."""
        self._say(self._line(validation))

    def _say(self, sentence: str) -> None:
        """Shows a line."""

    @property
    def _number(self) -> int:
        """The epoch of the step."""
        return (self._step - 1) // self._steps_per_epoch + 1

    def _line(self, validation: str) -> str:
        """The line of the epoch that ends here."""
        intervals, self._intervals = self._intervals, []
        if not intervals:  # a run that goes on with the validation of an epoch
            return f"epoch {self._number}/{self._epochs}: {validation or 'done'}"
        means = {key: _mean([(n, m.get(key)) for n, m, _ in intervals]) for key in ("loss", "accuracy")}
        means["skipped_steps"] = sum(m.get("skipped_steps") or 0.0 for _, m, _ in intervals)
        pace = _mean([(n, 1 / rate if rate else None) for n, _, rate in intervals])  # seconds an image
        said = describe(means, 1 / pace if pace else None, validation)
        return f"epoch {self._number}/{self._epochs}: {said}, {duration(self._left)} left"


class _Lines(Display):
    def __init__(self, total: int, steps_per_epoch: int, start: int, stream: IO[str]) -> None:
        super().__init__(total, steps_per_epoch, start)
        self._stream = stream
        self._shown: float | None = None  # when the last line was

    def step(self, step: int, means: Means | None, rate: float | None, *, due: bool) -> None:
        super().step(step, means, rate, due=due)
        at_end = step % self._steps_per_epoch == 0  # the epoch's own line comes next
        recent = self._shown is not None and time.monotonic() - self._shown < SECONDS
        if means is None or recent or (at_end and self._shown is not None):
            return
        # The first step is shown at once: it tells that compiling is over.
        ahead = "" if self._left is None else f", {duration(self._left)} left"
        self._say(f"epoch {self._number}, step {step}/{self._total}: {describe(means, rate)}{ahead}")

    def _say(self, sentence: str) -> None:
        self._shown = time.monotonic()
        print(sentence, file=self._stream, flush=True)


class _TwoLines(Progress):
    """A bar, and below it the metrics, which are too long to stand beside it."""

    metrics = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar's table, then the metrics."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.metrics)


class _Bar(Display):
    def __init__(self, total: int, steps_per_epoch: int, start: int, console: Console) -> None:
        super().__init__(total, steps_per_epoch, start)
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

    def step(self, step: int, means: Means | None, rate: float | None, *, due: bool) -> None:
        super().step(step, means, rate, due=due)
        self._rate = self._rate if rate is None else rate
        if means is not None:
            self.progress.metrics = "; ".join(filter(None, [describe(means, self._rate), solves(means)]))
        description = f"epoch {self._number}/{self._epochs}"
        self.progress.update(self._task, completed=step, description=description, left=duration(self._left))

    def _say(self, sentence: str) -> None:
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
        yield _Lines(total, steps_per_epoch, start, stream)
        return
    bar = _Bar(total, steps_per_epoch, start, console)
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
