"""SIGTERM and SIGINT: finish the step in hand, save, leave with exit code 0, all within ten seconds.

Three moments need three answers. While a step runs or a checkpoint is written the signal is only noted, and
the loop looks at the note between steps (`Stopper.deferred`). While data are loaded or a split is evaluated
nothing would be lost by stopping, so `Preempted` is raised there and then; should it be raised where Python drops
what is raised (a garbage collector's callback, a `__del__`), it is raised once more a moment later. And while XLA
compiles, Python runs no signal handler at all: a thread fed by `signal.set_wakeup_fd` sees the signal anyway and, if
the loop has not come to its stopping point in time, ends the process. Nothing is lost but the step in hand, since what
is on disk is always whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 8.0  # the promise is ten seconds, and leaving takes a moment
AGAIN_SECONDS = 0.02  # by then a finalizer, in which what is raised is lost, has ended


class Preempted(BaseException):
    """A stop was asked for where nothing is lost by stopping.

    It is not an `Exception`, so that no library swallows it.
    """


class Stopper:
    """The note that a stop was asked for, and the places where it may take effect at once.

    Attributes:
        requested: The signal's name once one has come, else None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = 0
        self._lost = False  # Preempted was raised, and reached nobody
        self._dropping = False  # while this is being found out
        self._busy = threading.Event()  # set while something is saved, which the watcher must let finish
        self._left = threading.Event()
        self._leaving = threading.Lock()  # held to send a signal, and to say that none may be sent any more

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is noted and nothing else."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within (even inside `deferred`), a signal raises `Preempted`; so does one that came before."""
        before, self._deferred = self._deferred, 0
        try:
            if self.requested is not None:
                raise Preempted(self.requested)
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within, the process is not ended from outside the main thread however long it takes."""
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()

    def request(self, name: str) -> None:
        """Asks for a stop, as a signal of that name would (repeated signals add nothing)."""
        if self._dropping:  # what is raised now would be dropped as well; the signal comes again
            return
        due, self.requested = self.requested is None or self._lost, self.requested or name
        self._lost = False
        if due and self._deferred == 0:
            raise Preempted(self.requested)

    def _raise_again(self) -> None:
        """To be called from where `Preempted` was dropped: the handler runs again, somewhere else."""
        self._dropping = self._lost = True
        try:
            number = signal.Signals[self.requested or "SIGTERM"]
            main = threading.main_thread().ident or 0

            def send() -> None:
                while self._lost:
                    time.sleep(AGAIN_SECONDS)
                    # Not while leaving: the signal might find the handlers of before, and end the process.
                    with self._leaving:
                        if self._left.is_set():
                            return
                        signal.pthread_kill(main, number)  # a true signal, which ends a sleep or a read too

            threading.Thread(target=send, daemon=True, name="preemption, again").start()
        finally:  # also where no thread can be started: signals must not be dropped for ever
            self._dropping = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.request(signal.Signals(signum).name)

    def _watch(self, pipe: int, leave: Callable[[str], None], grace: float) -> None:
        while True:
            byte = os.read(pipe, 1)
            if not byte:
                return
            if byte[0] in SIGNALS:
                break
        deadline = time.monotonic() + grace
        while not self._left.wait(max(0.0, deadline - time.monotonic())):
            if not self._busy.is_set():
                leave(signal.Signals(byte[0]).name)
                return
            deadline = time.monotonic() + 0.1


def _leave(name: str) -> None:
    message = (
        f"\nstopped by {name} while a step was still running or compiling; the checkpoint on disk stands: "
        "run the same command to go on\n"
    )
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(message)
        sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def _not_dropped(stopper: Stopper) -> Iterator[None]:
    """Within, a `Preempted` that a finalizer or a collector's callback would swallow is not lost, nor told as an
    error.
    """
    before = sys.unraisablehook

    def hook(told: Any) -> None:
        if isinstance(told.exc_value, Preempted):
            stopper._raise_again()
        else:
            before(told)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # else somebody's hook calls ours, which does no harm
            sys.unraisablehook = before


@contextlib.contextmanager
def watch(grace: float = GRACE_SECONDS, leave: Callable[[str], None] = _leave) -> Iterator[Stopper]:
    """Listens for SIGTERM and SIGINT; outside the main thread it only gives a `Stopper` that nobody signals.

    Args:
        grace: Seconds from the signal until the process is ended, unless it has left by itself or is saving.
        leave: What ends the process then; it takes the signal's name.

    Yields:
        The `Stopper`.
    """
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=stopper._watch, args=(reader, leave, grace), daemon=True, name="preemption")
    watcher.start()
    try:
        for number in SIGNALS:
            signal.signal(number, stopper._handle)
        try:
            with _not_dropped(stopper):
                yield stopper
        finally:
            stopper._deferred += 1  # from here on a signal is only noted: all of what follows takes place
    finally:
        with stopper._leaving:
            stopper._left.set()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)
        watcher.join()
        os.close(reader)
