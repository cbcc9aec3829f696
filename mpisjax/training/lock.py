"""One run to a workdir: an advisory lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from mpisjax.errors import UserError
from mpisjax.training.processes import run_on_primary
from mpisjax.training.run_folder import is_bucket, path_of, unreachable

LOCK_NAME = ".lock"

# Folders this process holds, and the thread that took each: a caller may lock early and call code that locks
# again.
_held: dict[Path, int] = {}


def open_workdir(workdir: str | os.PathLike[str]) -> Path:
    """Makes the folder of a run where it is missing, and makes sure that it can be written.

    Args:
        workdir: The folder of the run.

    Returns:
        Its absolute path.

    Raises:
        UserError: It is a file, or it cannot be made or written.
    """
    path = Path(workdir).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir {workdir} is a file or lies below one; name a folder") from error
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be made ({error.strerror}); name a folder you may write to"
        ) from error
    return path


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Holds a run's folder for as long as the context lasts; within one thread it may be nested.

    A folder in which nothing has been written by then is removed. One in a bucket cannot be locked: that no two runs share
    it is left to the user. Of several processes the first holds the folder for all;
    every one of them must call this.

    Args:
        workdir: The folder of the run; made where it is missing.

    Yields:
        Its absolute path.

    Raises:
        UserError: Another run holds the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        yield path_of(run_on_primary(lambda: os.fspath(stack.enter_context(_hold(workdir)))))


@contextlib.contextmanager
def _hold(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    if is_bucket(workdir):
        yield _open_bucket(path_of(workdir))
        return
    made = _missing(workdir)
    path = open_workdir(workdir)
    me = threading.get_ident()
    if _held.get(path) == me:
        yield path
        return
    if path in _held:
        raise UserError(
            f"--workdir {path} is in use by another run in this process; give each run its own folder"
        )
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror
        raise UserError(
            f"--workdir {path} cannot be written ({reason}); name a folder you may write to"
        ) from error
    try:
        _take(descriptor, path)
        _held[path] = me
        try:
            yield path
        finally:
            del _held[path]
            _leave_no_trace(path, made)
    finally:
        # This drops the lock; the file stays, since removing it would race with the next run.
        os.close(descriptor)


def _open_bucket(path: Path) -> Path:
    """Makes sure that a folder in a bucket can be read and written; nothing there can be locked."""
    try:
        (path / LOCK_NAME).write_bytes(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except Exception as error:
        raise unreachable(path, error) from error
    return path


def _missing(workdir: str | os.PathLike[str]) -> list[Path]:
    """The folders above a workdir that are not there, the innermost first."""
    parents = Path(workdir).expanduser().resolve().parents
    return list(itertools.takewhile(lambda p: not p.exists(), parents))


def _leave_no_trace(path: Path, made: list[Path]) -> None:
    """Removes the folder of a run that has failed before it wrote anything, and those that it made above, if empty."""
    with contextlib.suppress(OSError):
        if os.listdir(path) == [LOCK_NAME]:
            (path / LOCK_NAME).unlink()
            for folder in (path, *made):
                folder.rmdir()


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"--workdir {path} cannot be locked ({error.strerror}); name a folder on a local disk"
            ) from error
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        by = f" ({holder})" if holder else ""
        raise UserError(
            f"--workdir {path} is in use by another run{by}; wait for it or name another folder"
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        pass  # a full disk must not stop a run that only has to finish; the name is for the message alone
