"""A checkpoint on disk: its record, how it is verified, and how it is read.

A checkpoint is a folder `step_00000123`. Orbax writes the training state into `state/` (`mpisjax.storage.saving`).
Beside it lies `checkpoint.json`, the record: the step, what the loop wants back, and the SHA-256 of every file of the
state. The record carries its own digest. It can be replaced in one rename, so that validation results join a checkpoint
that is on disk.

Before a state is read, its files are hashed and compared with the record; a checkpoint that fails is named, and the one
before it is used. Arrays and JSON are all that is read: nothing in a checkpoint can execute.

The arrays of a dtype are written as one. Saved array by array, a state of 140 arrays leaves about 100 KB of memory
behind with every save, and takes five times as long (orbax 0.12.8, tensorstore 0.1.86; docs/robustness.md has the
figures, tests/memory_of_saves.py shows it).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mpisjax.errors import UserError
from mpisjax.storage import packing
from mpisjax.storage.processes import run_on_primary
from mpisjax.storage.run_folder import is_bucket, unreachable, write_atomically

FOLDER = "checkpoints"  # in a run's folder
FORMAT = 2
RECORD_NAME = "checkpoint.json"
STATE_NAME = "state"
COMMIT_NAME = "commit_success.txt"  # in a bucket orbax counts a checkpoint from this file on
STEP_NAME = re.compile(r"step_(\d{8,})")
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """One checkpoint.

    Attributes:
        path: Its folder.
        step: Training steps taken when it was written.
        layout: Dtype and shape of each array by its place in the tree, in the tree's order.
        content: What the writer stored beside the arrays (JSON).
        key_impls: The implementation (`jax.random.key_impl`) of each random key by its place.
    """

    path: Path
    step: int
    layout: dict[str, str]
    content: dict[str, Any]
    key_impls: Mapping[str, str] = {}


class DamagedError(Exception):
    """A checkpoint's files are not what its writer wrote; the text names one of them."""


def update(checkpoint: Checkpoint, content: dict[str, Any]) -> Checkpoint:
    """Replaces the content of a checkpoint on disk in one rename; the arrays stay.

    Raises:
        UserError: The disk is full or the folder cannot be written. The earlier record stands.
    """

    def replace() -> None:
        try:
            files = json.loads((checkpoint.path / RECORD_NAME).read_text())["files"]
            write_record(checkpoint._replace(content=content), files)
        except OSError as error:
            raise storage_error(error, checkpoint.path.parent, checkpoint.step, there=True) from error

    run_on_primary(replace)
    return checkpoint._replace(content=content)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a folder, earliest first, sound or not."""
    paths = directory.iterdir() if directory.exists() else ()
    found = [(STEP_NAME.fullmatch(path.name), path) for path in paths]
    whole = [match for match, path in found if not is_bucket(path) or (path / RECORD_NAME).exists()]
    return sorted(int(match[1]) for match in whole if match)


def newest(directory: Path) -> Checkpoint | None:
    """The newest sound checkpoint; a warning names each newer one that is damaged.

    Returns:
        The checkpoint, or None where there is none, sound or damaged.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """

    def find() -> int | None:
        present = steps(directory)
        for step in reversed(present):
            try:
                return read(directory, step).step
            except DamagedError as error:
                _log.warning("checkpoint of step %d is damaged and is passed over: %s", step, error)
        if present:
            raise UserError(f"all checkpoints in {directory} are damaged; delete the folder to start the run again")
        return None

    step = run_on_primary(find)
    return None if step is None else read(directory, step, verify=False)


def read(directory: Path, step: int, *, verify: bool = True) -> Checkpoint:
    """Reads the record of a checkpoint and, unless `verify` is False, compares every file of the state with it.

    Raises:
        DamagedError: A file is missing, cut short, altered or added.
        UserError: A newer version of mpisjax wrote it.
    """
    path = path_of_step(directory, step)
    try:
        record = json.loads((path / RECORD_NAME).read_bytes())
        if record["digest"] != _digest_of_record(record) or record["step"] != step:
            raise DamagedError(f"{path / RECORD_NAME} does not match its own digest")
        version, files = record["format"], record["files"]
        found = Checkpoint(path, **{key: record[key] for key in record if key in Checkpoint._fields})
    except FileNotFoundError as error:
        raise DamagedError(f"{path / RECORD_NAME} is missing") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path / RECORD_NAME} is not a checkpoint record") from error
    if version != FORMAT or not record.get("one_piece", True):  # False: arrays one by one, as format 1 had them
        raise UserError(f"{path} has a checkpoint format that is no longer read; use the version that wrote it")
    present = digests(path / STATE_NAME) if verify else files
    for name in sorted(files.keys() | present.keys()):
        if not name.endswith(COMMIT_NAME) and files.get(name) != present.get(name):
            wrong = "has been cut short or altered" if name in present else "is missing"
            raise DamagedError(f"{path / name} {wrong}")
    return found


def restore(checkpoint: Checkpoint, template: Any) -> Any:
    """Reads the arrays of a checkpoint that `read` has verified.

    Args:
        checkpoint: What to restore.
        template: A pytree of arrays (or of shapes with shardings) of the structure that was saved. The arrays
            that come back lie where the template's lie, however many devices wrote them. A random key comes back
            with the implementation that it was saved with, whatever the template's.

    Raises:
        UserError: The state in the checkpoint has another structure or other shapes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    if misfit := packing.misfit(checkpoint.layout, wanted):
        place, there, here = misfit
        raise UserError(
            f"{checkpoint.path} does not fit the training state of this config: state{place} is {there} there and "
            f"{here} here; use the config and the version of mpisjax that wrote it"
        )
    return jax.tree.unflatten(structure, _arrays(checkpoint, wanted))


def _arrays(checkpoint: Checkpoint, wanted: dict[str, Any]) -> list[Any]:
    """Arrays of a checkpoint by place, in the order of `wanted`, which says where they lie."""
    path = absolute(checkpoint.path / STATE_NAME)
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        found = packing.unpack(checkpointer.restore(path), checkpoint.layout, wanted, checkpoint.key_impls)
    return [found[place] for place in wanted]


def restore_variables(checkpoint: Checkpoint, template: Any, origin: str) -> Any:
    """Reads of a checkpoint the weights that evaluation takes, averages where they are kept, and nothing else.

    Args:
        checkpoint: One that `read` has verified.
        template: `{"params": ..., "batch_stats": ...}`: arrays, or shapes with shardings. The arrays that come back
            lie where the template's lie.
        origin: Where they come from, for the message.

    Raises:
        UserError: They are another network's.
    """
    averaged = any(place.startswith(".ema[") for place in checkpoint.layout)

    def place_of(path: Any) -> str:
        within = jax.tree_util.keystr(path)
        return f".ema{within}" if averaged else f".{path[0].key}{jax.tree_util.keystr(path[1:])}"

    roots = (".ema[",) if averaged else (".params[", ".batch_stats[")
    theirs = {place: kind for place, kind in checkpoint.layout.items() if place.startswith(roots)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {place_of(path): leaf for path, leaf in leaves}
    if misfit := packing.misfit(theirs, wanted):
        place, there, here = misfit
        name = "/".join(re.findall(r"[^\[\]'.]+", place.removeprefix(".ema")))
        raise UserError(
            f"the weights from {origin} are of another network: {name} is {there} there and {here} here; use its model "
            "settings and its kind of data"
        )
    return jax.tree.unflatten(structure, _arrays(checkpoint, wanted))


def path_of_step(directory: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return directory / f"step_{step:08d}"


def absolute(path: Path) -> Path:
    """Orbax takes no other path; an address in a bucket is one."""
    return path if is_bucket(path) else path.absolute()


def digests(state: Any, sync: bool = False) -> dict[str, str]:
    """The SHA-256 of every file in a state's folder, by its place in the checkpoint; `sync` forces them to the disk."""
    found, waiting = {}, [state] if state.exists() else []
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir():
                waiting.append(path)
                continue
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if sync and not is_bucket(path):
                    os.fsync(stream.fileno())
            found[f"{STATE_NAME}{os.fspath(path).removeprefix(os.fspath(state))}"] = digest
    return dict(sorted(found.items()))


def write_record(checkpoint: Checkpoint, files: dict[str, str]) -> None:
    """Writes the record into the checkpoint's folder; `files` are the `digests` of its state."""
    record = {"format": FORMAT, **checkpoint._asdict(), "files": files}
    path = record.pop("path")
    record["digest"] = _digest_of_record(record)
    write_atomically(path / RECORD_NAME, json.dumps(record, indent=1).encode())


def _digest_of_record(record: dict[str, Any]) -> str:
    signed = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def storage_error(error: Exception, directory: Path, step: int, there: bool = False) -> Exception:
    """The sentence for a failed write, or the error itself where it is not the disk's."""
    if is_bucket(directory) and not isinstance(error, UserError):
        return unreachable(directory, error)
    text = str(error)
    what = f"the record of the checkpoint of step {step}" if there else f"the checkpoint of step {step}"
    standing = [other for other in steps(directory) if there or other != step]
    stands = f"the one of step {standing[-1]} stands" if standing else "none stood before it"
    number = error.errno if isinstance(error, OSError) else None
    signs = ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large")
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in text for sign in signs):
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
