"""A run's folder, on a disk or in a bucket such as gs://: where it is, who holds it, and how files get there whole.

Orbax writes checkpoints to both. Everything else that a run writes grows line by line, which a bucket cannot do. So a
run in a bucket keeps its small files in a folder of this machine. They are copied up with every checkpoint and at the
end, and copied down when the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import filelock

from mpisjax.errors import UserError
from mpisjax.paths import cache_folder, expand
from mpisjax.storage.processes import run_on_primary

LOCK_NAME = ".lock"


def is_bucket(path: Any) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def path_of(workdir: Any) -> Path:
    """A run's folder as a path. One in a bucket is an `epath.Path`, which has the same methods.

    Raises:
        UserError: The address is of an unknown kind, or the package that reads it is missing.
    """
    if not is_bucket(workdir):
        return Path(expand(workdir))
    name = os.fspath(workdir)
    if not name.startswith("gs://") or not name.removeprefix("gs://").strip("/"):
        raise UserError(f"--workdir {name} is no folder in a bucket; give a folder, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"--workdir {name} needs the package gcsfs; pip install gcsfs, or name a folder")
    from etils import epath

    return cast(Path, epath.Path(name.rstrip("/")))


def local_of(workdir: Path) -> Path:
    """Where a run keeps its small files: in its own folder, or for a bucket in the user's cache."""
    if not is_bucket(workdir):
        return workdir
    name = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
    folder = cache_folder("buckets", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def pull(workdir: Path) -> None:
    """Copies the small files of a run in a bucket to this machine; older copies are removed."""
    if not is_bucket(workdir):
        return
    local = local_of(workdir)
    for path in _files(local).values():
        path.unlink()
    if workdir.exists():
        for path in workdir.iterdir():
            if path.is_file():
                (local / path.name).write_bytes(path.read_bytes())


def push(workdir: Path) -> None:
    """Copies the small files of a run up to its bucket.

    Raises:
        UserError: The bucket cannot be written.
    """
    if not is_bucket(workdir):
        return
    try:
        for name, path in _files(local_of(workdir)).items():
            (workdir / name).write_bytes(path.read_bytes())
    except Exception as error:
        raise unreachable(workdir, error) from error


def unreachable(workdir: Any, error: Exception) -> UserError:
    """The sentence for a bucket that cannot be read or written."""
    return UserError(
        f"{workdir} cannot be read or written ({' '.join(str(error).split())[:200] or type(error).__name__}); check "
        "the bucket's name, this machine's credentials and the network, and run the same command to go on"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that its name always shows the old bytes or the new ones, whole."""
    if is_bucket(path):  # an object in a bucket is always whole
        path.write_bytes(data)
        return
    draft = path.with_name(f"{path.name}.draft")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Holds a run's folder for as long as the context lasts; within one thread it may be nested.

    A folder in which nothing has been written by then is removed. A folder in a bucket cannot be locked: there the user
    sees to it that no two runs share it. Of several processes the first holds the folder for all; every one of them
    must call this.

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
    me = f"process {os.getpid()} on {socket.gethostname()}"
    path = path_of(workdir)
    if is_bucket(path):  # nothing there can be locked, but it must be there to be read and written
        try:
            (path / LOCK_NAME).write_bytes(f"{me}\n".encode())
        except Exception as error:
            raise unreachable(path, error) from error
        yield path
        return
    path = path.resolve()
    made = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir {workdir} is a file or lies below one; name a folder") from error
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be made ({error.strerror}); name a folder you may write to"
        ) from error
    # One lock object for each folder, so that the thread that holds it may take it again. No soft lock in place of a
    # real one: a run that dies would leave it behind.
    lock = filelock.FileLock(path / LOCK_NAME, blocking=False, is_singleton=True, fallback_to_soft=False)
    nested = lock.is_locked
    _acquire(lock, path, me)
    try:
        # The name is for the message alone: a full disk must not stop a run that only has to finish.
        with contextlib.suppress(OSError):
            (path / LOCK_NAME).write_text(f"{me}\n")
        yield path
    finally:
        if not nested:
            _remove_if_empty(path, made)
        lock.release()


def _acquire(lock: filelock.BaseFileLock, path: Path, me: str) -> None:
    try:
        lock.acquire()
    except filelock.Timeout as error:
        if not (path / LOCK_NAME).exists():  # the file could not be made, which filelock takes for a lock
            raise _unwritable(path, os.strerror(errno.ENOENT)) from error
        holder = ""
        with contextlib.suppress(OSError):  # on Windows nobody else can read it
            holder = (path / LOCK_NAME).read_text(errors="replace").strip()
        if holder == me:
            raise UserError(
                f"--workdir {path} is in use by another run in this process; give each run its own folder"
            ) from error
        by = f" ({holder[:200]})" if holder else ""
        raise UserError(f"--workdir {path} is in use by another run{by}; wait for it or name another folder") from error
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK):
            raise UserError(
                f"--workdir {path} cannot be locked ({error.strerror}); name a folder on a local disk"
            ) from error
        raise _unwritable(path, error.strerror) from error


def _unwritable(path: Path, reason: str | None) -> UserError:
    return UserError(f"--workdir {path} cannot be written ({reason}); name a folder you may write to")


def _remove_if_empty(path: Path, made: list[Path]) -> None:
    """Removes the folder of a run that has failed before it wrote anything, and the empty ones that it made above."""
    with contextlib.suppress(OSError):
        if os.listdir(path) == [LOCK_NAME]:
            (path / LOCK_NAME).unlink()
            for folder in (path, *made):
                folder.rmdir()
