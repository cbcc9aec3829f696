"""Reads files out of a tar archive without trusting it.

Nothing is ever extracted to disk. Only named members are kept, what is decompressed is bounded, and an archive with a
member that would land outside its folder is refused whole.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mpisjax.errors import UserError

MAX_BYTES = 512 << 20  # decompressed; the CIFAR archives have 185 MB
MAX_MEMBERS = 1000


class TooLarge(Exception):
    """More was decompressed than is accepted."""


class Bounded(io.RawIOBase):
    """A stream that refuses to give more than so many bytes in all."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        super().__init__()
        self._stream, self._left = stream, limit

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes.

        Raises:
            TooLarge: If the stream has more than the limit.
        """
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        block = self._stream.read(wanted)
        self._left -= len(block)
        if self._left < 0:
            raise TooLarge
        return block


def read_members(path: Path, wanted: Collection[str], limit: int = MAX_BYTES) -> dict[str, bytes]:
    """Reads members of a tar archive, gzipped or plain.

    Args:
        path: The archive.
        wanted: The names of the members to keep, e.g. "cifar-10-batches-bin/test_batch.bin".
        limit: How many bytes the whole archive may decompress to.

    Returns:
        The contents by name; a wanted member that is not there is left out.

    Raises:
        UserError: If the archive is truncated, damaged, too large, or has a member with a path that climbs out of it,
            or if a wanted member is no regular file.
    """
    try:
        with path.open("rb") as raw:
            return parse(raw, str(path), wanted, limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def parse(raw: BinaryIO, name: str, wanted: Collection[str], limit: int = MAX_BYTES) -> dict[str, bytes]:
    """As `read_members`, from an open and seekable file called `name` in errors."""
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    stream: BinaryIO = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
    bounded = Bounded(stream, limit)
    found: dict[str, bytes] = {}
    try:
        # Read as a stream: nothing can make it seek backwards, so no header can make it go in circles.
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for count, member in enumerate(archive):
                _check_member(name, count, member)
                if member.name in wanted:
                    found[member.name] = _content(name, archive, member, limit)
        while bounded.read(1 << 20):  # to the end, so that gzip checks its checksum
            pass
    except TooLarge:
        raise UserError(
            f"{name} decompresses to more than {limit >> 20} MiB, which is no such data set"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, struct.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is truncated or damaged ({error}): fetch the archive again") from error
    return found


def _check_member(name: str, count: int, member: tarfile.TarInfo) -> None:
    if count >= MAX_MEMBERS:
        raise UserError(f"{name} has more than {MAX_MEMBERS} members, which is no such data set")
    for target in (member.name, member.linkname):
        parts = PurePosixPath(target)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{name} has a member that climbs out of the archive ({target!r}): do not use it")


def _content(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not member.isreg():
        raise UserError(f"{name}: {member.name} is no regular file: fetch the archive again")
    if member.size > limit:
        raise TooLarge
    stream = archive.extractfile(member)
    content = b"" if stream is None else stream.read()
    if len(content) != member.size:
        raise UserError(f"{name}: {member.name} is truncated: fetch the archive again")
    return content
