"""A run's folder, on a disk or in a bucket such as gs://.

Orbax writes checkpoints to both. Everything else that a run writes grows line by line, which a bucket cannot do. So a run
in a bucket keeps its small files in a folder of this machine. They are copied up with every checkpoint and at the end,
and copied down when the run goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, cast

from mpisjax.errors import UserError
from mpisjax.paths import cache_folder, expand


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
        f"{workdir} cannot be read or written ({' '.join(str(error).split())[:200] or type(error).__name__}); check the "
        "bucket's name, this machine's credentials and the network, and run the same command to go on"
    )
