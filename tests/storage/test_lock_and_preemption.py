"""One run to a folder, and signals that come while Python cannot listen."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mpisjax.errors import UserError
from mpisjax.storage.preemption import Preempted, watch
from mpisjax.storage.run_folder import hold

HOLD = """
import sys
from mpisjax.storage.run_folder import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_that_wrote_nothing_leaves_no_folder_behind(tmp_path):
    with hold(tmp_path / "runs" / "digits") as path:
        assert path.is_dir()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()  # what was there stays, and so does a folder that holds another run
    with hold(tmp_path / "runs" / "digits"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    with hold(tmp_path / "new" / "a"), hold(tmp_path / "new" / "b") as other:
        (other / "metrics.jsonl").touch()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["b"]


def test_a_second_run_is_refused_until_the_first_dies(tmp_path, holder):
    with pytest.raises(UserError, match=f"is in use by another run .process {holder.pid} on "):
        hold(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path) as path:
        assert path == tmp_path.resolve()


def test_one_thread_may_nest_and_another_may_not(tmp_path):
    told = []

    def other() -> None:
        try:
            with hold(tmp_path):
                pass
        except UserError as error:
            told.append(str(error))

    with hold(tmp_path), hold(tmp_path / "x" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in use by another run in this process" in told[0]
    other()
    assert len(told) == 1


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file or lies below one"):
            hold(path).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written .Permission denied.; name a folder"):
        hold(tmp_path).__enter__()
    with pytest.raises(UserError, match=r"cannot be made .Permission denied.; name a folder"):
        hold(tmp_path / "below").__enter__()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nothing can be made")
def test_an_unwritable_folder_is_told():
    with pytest.raises(UserError, match="cannot be made"):
        hold("/proc/self/run").__enter__()
    with pytest.raises(UserError, match="cannot be written"):
        hold("/proc/self").__enter__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_only_where_nothing_is_lost(number):
    before = signal.getsignal(number)
    with watch() as stopper:
        with stopper.deferred():
            signal.raise_signal(number)
            assert stopper.requested == signal.Signals(number).name
            signal.raise_signal(number)  # again: nothing more
        with stopper.deferred(), pytest.raises(Preempted), stopper.interruptible():
            pytest.fail("the signal came before")
    with watch() as stopper, stopper.deferred(), pytest.raises(Preempted), stopper.interruptible():
        signal.raise_signal(number)
        pytest.fail("the signal takes effect at once")
    with watch() as stopper, pytest.raises(Preempted):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


class Finalized:
    """Its end is where a signal comes, as it may in any library's."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def in_the_collector():
    """A callback of the collector's into which a signal comes, once."""
    due = []

    def called(phase, info):
        if due and phase == "start":
            due.pop()
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(called)
    yield due
    gc.callbacks.remove(called)


@pytest.mark.parametrize("place", ["finalizer", "collector"])
def test_a_signal_is_not_lost_where_python_drops_what_is_raised(place, capsys, in_the_collector):
    with watch() as stopper, pytest.raises(Preempted):
        if place == "finalizer":
            Finalized()
        else:
            in_the_collector.append(signal.SIGTERM)
            gc.collect()
        assert stopper.requested == "SIGTERM"
        time.sleep(20)
        pytest.fail("the signal was lost")
    assert capsys.readouterr().err == ""


def test_a_signal_that_was_dropped_waits_where_it_must():
    with watch() as stopper:
        with stopper.deferred():
            with stopper.interruptible():
                Finalized()
            time.sleep(0.1)  # comes again here, and is only noted
            assert stopper.requested == "SIGTERM"
        with pytest.raises(Preempted), stopper.interruptible():
            pytest.fail("the signal came before")


LEAVING = """
import random, signal, time
from mpisjax.storage import preemption

preemption.AGAIN_SECONDS = 0.001  # so that signals come while the watch begins, is found out about, and ends
random.seed(0)


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


for number in range(400):
    try:
        with preemption.watch() as stopper, stopper.deferred() if number % 2 else stopper.interruptible():
            with stopper.interruptible():
                Finalized()
            end = time.perf_counter() + 0.003 * random.random()
            while time.perf_counter() < end:
                time.sleep(0.0002)
    except preemption.Preempted:
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("alive")
"""


def test_a_signal_that_comes_again_never_meets_a_process_that_no_longer_watches():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_a_process_that_does_not_come_to_its_stopping_point_is_ended():
    left = threading.Event()
    with (
        watch(grace=0.05, leave=lambda name: left.set() if name == "SIGTERM" else None) as stopper,
        stopper.deferred(),
    ):
        signal.raise_signal(signal.SIGTERM)
        assert left.wait(20)


def test_a_save_is_let_finish():
    left = threading.Event()
    with watch(grace=0.05, leave=lambda name: left.set()) as stopper, stopper.deferred():
        with stopper.saving():
            signal.raise_signal(signal.SIGTERM)
            assert not left.wait(0.5)
        assert left.wait(20)


def test_a_process_that_leaves_in_time_is_left_alone():
    left = threading.Event()
    with watch(grace=0.2, leave=lambda name: left.set()) as stopper, stopper.deferred():
        signal.raise_signal(signal.SIGTERM)
    assert not left.wait(0.5)


BUSY = """
import ctypes, signal, sys
from mpisjax.storage.preemption import watch
pause = ctypes.CDLL(None).pause
with watch(grace=0.2) as stopper, stopper.deferred():
    print("ready", flush=True)
    while True:
        pause()  # as a compilation: no return to Python worth speaking of
"""


def test_even_while_python_cannot_listen():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout.readline() == "ready\n"
        time.sleep(0.1)
        it.send_signal(signal.SIGTERM)
        _, said = it.communicate(timeout=60)
    assert it.returncode == 0
    assert "stopped by SIGTERM while a step was still running or compiling" in said
