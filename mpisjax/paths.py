"""Paths: the one meaning of those that a user gives, and the folder where this package keeps its own files."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def expand(path: str | os.PathLike[str]) -> str:
    """A path as text, its leading `~` replaced by the user's home; an address such as gs://bucket/folder stays."""
    text = os.fspath(path)
    return text if "://" in text else os.path.expanduser(text)


def cache_folder(*parts: str) -> Path:
    """The user's cache folder for this package, or a folder in it; nothing is created.

    On Linux it is `$XDG_CACHE_HOME/mpisjax`, by default `~/.cache/mpisjax`. It is read anew at every call.

    Args:
        parts: Names of folders below it.
    """
    return platformdirs.user_cache_path("mpisjax", appauthor=False).joinpath(*parts)
