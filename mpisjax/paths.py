"""The one meaning of a path that a user gives, on the command line, in a config or in a call."""

from __future__ import annotations

import os


def expand(path: str | os.PathLike[str]) -> str:
    """A path as text, its leading `~` replaced by the user's home; an address such as gs://bucket/folder stays."""
    text = os.fspath(path)
    return text if "://" in text else os.path.expanduser(text)
