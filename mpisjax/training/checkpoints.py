"""Checkpoints that are either whole or not there, and never trusted without a look.

A checkpoint is a folder `step_00000123`: the training state as orbax writes it (`state/`, see `arrays`), and
`checkpoint.json`, the record: the step, the run's config, whatever the loop wants back, and the SHA-256 of
every file beside it. The folder is written under a temporary name, synced, and renamed, so that a run killed
at any moment leaves the earlier ones as they were. (In a bucket, where nothing is renamed, it is written under its own
name, and counts as there once its record is, which comes last.) The record carries its own digest and is replaced in one
rename, too: validation results join a checkpoint that is already on disk. On restoring, every file is hashed
again; a checkpoint that fails is named, set aside, and the one before it is used (`mpisjax.training.upkeep`). Arrays and JSON are all
that is ever read: nothing in a checkpoint can execute.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from mpisjax.errors import UserError
from mpisjax.training import arrays
from mpisjax.training.durable import digests, sync, sync_tree, write_atomically
from mpisjax.training.processes import first_does
from mpisjax.training.storage import is_bucket, unreachable

FORMAT = 2  # 1 had no "one_piece": its arrays are written one by one
RECORD_NAME = "checkpoint.json"
STATE_NAME = "state"
STEP_NAME = re.compile(r"step_(\d{8,})")


class Checkpoint(NamedTuple):
    """One checkpoint on disk.

    Attributes:
        path: Its folder.
        step: Training steps taken when it was written.
        layout: Shape and dtype of each array by its place in the tree.
        content: What the writer stored beside the arrays (JSON).
        one_piece: How the arrays were written (`mpisjax.training.arrays`).
    """

    path: Path
    step: int
    layout: arrays.Layout
    content: dict[str, Any]
    one_piece: bool = False


class DamagedError(Exception):
    """A checkpoint whose files are not what its writer wrote; the text says which and how."""


def save(directory: Path, step: int, state: Any, content: dict[str, Any]) -> Checkpoint:
    """Writes a checkpoint; afterwards it is whole under its name, or the folder is as it was.

    Args:
        directory: Where the checkpoints of a run lie; made where it is missing.
        step: Training steps taken so far; names the checkpoint.
        state: Any pytree of arrays; of several processes, each writes what its devices hold.
        content: Anything JSON can hold, given back on reading.

    Returns:
        The checkpoint.

    Raises:
        UserError: The disk is full or the folder cannot be written; earlier checkpoints stand.
    """
    final = directory / f"step_{step:08d}"
    draft = final if is_bucket(directory) else directory / f".draft_{step:08d}"
    made = Checkpoint(final, step, arrays.layout_of(state), content, arrays.in_one_piece(directory, state))

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if is_bucket(directory):
            remove(final)
            return
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()

    def finish() -> None:
        _write_record(made._replace(path=draft), digests(draft, but=RECORD_NAME))
        if is_bucket(directory):
            return
        sync_tree(draft)
        if final.exists():  # the same step over again: what stands there is not what this run continues from
            remove(final)
        os.replace(draft, final)
        sync(directory)

    try:
        first_does(begin)
        arrays.write(draft / STATE_NAME, state)
        first_does(finish)
    except Exception as error:
        if not is_bucket(directory):
            shutil.rmtree(draft, ignore_errors=True)
        raise _storage_error(error, directory, step) from error
    return made


def update(checkpoint: Checkpoint, content: dict[str, Any]) -> Checkpoint:
    """Replaces the JSON part of a checkpoint on disk in one rename; the arrays stay.

    Raises:
        UserError: The disk is full or the folder cannot be written; the earlier record stands.
    """

    def replace() -> None:
        try:
            files = json.loads((checkpoint.path / RECORD_NAME).read_text())["files"]
            _write_record(checkpoint._replace(content=content), files)
            sync(checkpoint.path)
        except OSError as error:
            raise _storage_error(error, checkpoint.path.parent, checkpoint.step, there=True) from error

    first_does(replace)
    return checkpoint._replace(content=content)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a folder, earliest first, sound or not."""
    if is_bucket(directory):
        folders = directory.iterdir() if directory.exists() else iter(())
        matches = [(STEP_NAME.fullmatch(path.name), path) for path in folders]
        return sorted(int(match[1]) for match, path in matches if match and (path / RECORD_NAME).exists())
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name)))


def read(directory: Path, step: int) -> Checkpoint:
    """Reads the record of a checkpoint and verifies every file against it.

    Raises:
        DamagedError: A file is missing, cut short or altered.
    """
    path = directory / f"step_{step:08d}"
    try:
        record = json.loads((path / RECORD_NAME).read_bytes())
        if record["digest"] != _digest_of_record(record) or record["step"] != step:
            raise DamagedError(f"{path / RECORD_NAME} does not match its own digest")
        if record["format"] not in (1, FORMAT):
            raise UserError(
                f"{path} has checkpoint format {record['format']}, not {FORMAT}; use the version that wrote it"
            )
        found = digests(path, but=RECORD_NAME)
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path / RECORD_NAME} is not a checkpoint record") from error
    for name in sorted(record["files"].keys() | found.keys()):
        if name not in found:
            raise DamagedError(f"{path / name} is missing")
        if record["files"].get(name) != found[name]:
            raise DamagedError(f"{path / name} has been cut short or altered")
    return Checkpoint(path, step, record["layout"], record["content"], record.get("one_piece", False))


def restore(checkpoint: Checkpoint, template: Any) -> Any:
    """Reads the arrays of a checkpoint that `read` has verified.

    Args:
        checkpoint: What to restore.
        template: A pytree of arrays (or of shapes with shardings) of the structure that was saved. The arrays
            that come back lie where the template's lie, however many devices wrote them.

    Raises:
        UserError: The state in the checkpoint has another structure or other shapes.
    """
    ours = arrays.layout_of(template)
    for place in sorted(checkpoint.layout.keys() | ours.keys()):
        theirs, wanted = checkpoint.layout.get(place, "absent"), ours.get(place, "absent")
        if theirs != wanted:
            raise UserError(
                f"{checkpoint.path} does not fit the training state of this config: state{place} is {theirs} there "
                f"and {wanted} here; use the config and the version of mpisjax that wrote it"
            )
    return arrays.read(checkpoint.path / STATE_NAME, template, one_piece=checkpoint.one_piece)


def remove(path: Path) -> None:
    """Removes a checkpoint so that a run killed half-way leaves no half of it under its name."""
    if is_bucket(path):
        if (path / RECORD_NAME).exists():
            (path / RECORD_NAME).unlink()
        if path.exists():
            path.rmtree()  # type: ignore[attr-defined]
        return
    doomed = path.with_name(f".doomed_{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_record(checkpoint: Checkpoint, files: dict[str, str]) -> None:
    record = {"format": FORMAT, **checkpoint._asdict(), "files": files}
    path = record.pop("path")
    record["digest"] = _digest_of_record(record)
    write_atomically(path / RECORD_NAME, json.dumps(record, indent=1).encode())


def _digest_of_record(record: dict[str, Any]) -> str:
    signed = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _storage_error(error: Exception, directory: Path, step: int, there: bool = False) -> Exception:
    """The sentence for a failed write, or the error itself where it is not the disk's."""
    if is_bucket(directory) and not isinstance(error, UserError):
        return unreachable(directory, error)
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    what = f"the record of the checkpoint of step {step}" if there else f"the checkpoint of step {step}"
    standing = [other for other in steps(directory) if there or other != step]
    stands = f"the one of step {standing[-1]} stands" if standing else "none stood before it"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        sign in text for sign in ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large")
    ):
        return UserError(
            f"the disk of {directory} is full, so {what} was not written ({stands}); free some "
            "space and run the same command to go on"
        )
    if isinstance(error, OSError):
        return UserError(
            f"{what} cannot be written to {directory} ({error.strerror or text}; {stands}); "
            "mend that and run the same command to go on"
        )
    return error
