"""Writes a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mpisjax.training.run_folder import is_bucket


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
