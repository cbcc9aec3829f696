"""Files that are whole or as they were, whatever happens while they are written, and that can be told to be so."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mpisjax.training.storage import is_bucket


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that its name always shows the old bytes or the new ones, whole."""
    if is_bucket(path):
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


def sync_tree(path: Path) -> None:
    """`sync` of every file and folder in a folder, and of itself."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Has a file or a folder's list of names on the disk before anything else happens; a bucket sees to that itself."""
    if is_bucket(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digests(path: Path, *, but: str) -> dict[str, str]:
    """The SHA-256 of every file in a folder and its folders, by its place there; of the file `but`, none."""
    found = {}
    if is_bucket(path):
        waiting = [path]
        while waiting:
            for file in waiting.pop().iterdir():
                if file.is_dir():
                    waiting.append(file)
                elif file != path / but:
                    place = os.fspath(file).removeprefix(f"{os.fspath(path)}/")
                    found[place] = hashlib.sha256(file.read_bytes()).hexdigest()
        return dict(sorted(found.items()))
    for file in sorted(path.rglob("*")):
        if file.is_file() and file not in (path / but, path / f"{but}.draft"):
            with open(file, "rb") as stream:
                found[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
