"""The checkpoints of a run: orbax's `CheckpointManager`, with a record and a digest beside each state.

Orbax writes a checkpoint whole or not at all, removes old ones and what a killed run left half written, and knows buckets.
This file adds three things.

* `checkpoint.json`, the record: the step, what the loop wants back, and the SHA-256 of every file of the state. It is
  written before orbax gives the checkpoint its name. It can be replaced in one rename, so that validation results join a
  checkpoint that is on disk already.
* Verification: before a state is read, its files are hashed and compared with the record. Arrays and JSON are all that is
  read; nothing in a checkpoint can execute.
* A state in one piece, where one process holds all of it (`mpisjax.training.packing`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from mpisjax.errors import UserError
from mpisjax.training import packing, processes
from mpisjax.training.atomic import write_atomically
from mpisjax.training.processes import run_on_primary
from mpisjax.training.run_folder import is_bucket, unreachable

FOLDER = "checkpoints"  # in a run's folder
FORMAT = 2  # 1 had no "one_piece": its arrays are written one by one
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
        one_piece: Whether the arrays of a dtype are written as one.
        key_impls: The implementation (`jax.random.key_impl`) of each random key by its place.
    """

    path: Path
    step: int
    layout: dict[str, str]
    content: dict[str, Any]
    one_piece: bool = False
    key_impls: Mapping[str, str] = {}


class DamagedError(Exception):
    """A checkpoint's files are not what its writer wrote; the text names one of them."""


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Writes a state, and the record when all files of the state are there."""

    record: Checkpoint

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        _write_record(self.record._replace(path=directory.parent), _digests(directory, sync=True))


class CheckpointWriter(contextlib.AbstractContextManager):
    """Writes the checkpoints of one run; every process of the run makes one and calls it at the same points.

    Args:
        directory: Where the checkpoints lie; made where it is missing. What a killed run left half written is removed.
        keep: How many of the latest checkpoints stay on disk.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = _absolute(directory)
        self._keep = keep
        # Compressed weights are a few percent smaller, and leave more memory behind.
        self._handler = _StateHandler(use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(STATE_NAME, ocp.args.PyTreeSave, self._handler)
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            step_format_fixed_length=8,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
            save_root_metadata=False,
            lightweight_initialize=True,  # else each checkpoint of an earlier version is warned of
        )
        try:
            run_on_primary(self._commit)
            self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)
        except Exception as error:
            raise _storage_error(error, self.directory, 0) from error

    def _commit(self) -> None:
        """In a bucket, gives orbax's mark to checkpoints that have their record: a run was killed between the two."""
        for step in steps(self.directory) if is_bucket(self.directory) else ():
            mark = _path(self.directory, step) / COMMIT_NAME
            if not mark.exists():
                mark.write_text("")

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends orbax's threads."""
        self._manager.close()

    def save(self, step: int, state: Any, content: dict[str, Any], best: int = 0) -> Checkpoint:
        """Writes a checkpoint; afterwards it is whole under its name, or the folder is as it was.

        Args:
            step: Training steps taken so far; names the checkpoint.
            state: Any pytree of arrays. Of several processes each writes what its devices hold.
            content: Anything that JSON can hold.
            best: The step of a checkpoint to keep beside the latest ones.

        Returns:
            The checkpoint.

        Raises:
            UserError: The disk is full or the folder cannot be written. Earlier checkpoints stand.
        """
        impls, arrays = packing.without_keys(state)
        one_piece = packing.is_whole(arrays) and processes.count() == 1
        layout, path = packing.layout_of(arrays), _path(self.directory, step)
        made = Checkpoint(path, step, layout, content, one_piece, impls)
        self._handler.record = made
        try:
            if step in self._manager.all_steps():  # what stands there is not what this run continues from
                self._manager.delete(step)
            saved = ocp.args.PyTreeSave(packing.pack(arrays) if one_piece else arrays)
            self._manager.save(step, args=ocp.args.Composite(**{STATE_NAME: saved}), force=True)
            for old in [other for other in self._manager.all_steps()[: -self._keep] if other != best]:
                self._manager.delete(old)
        except Exception as error:
            self._drop_drafts()
            raise _storage_error(error, self.directory, step) from error
        return made

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint, as the function `newest`; damaged ones after it are removed."""
        found = newest(self.directory)
        for step in self._manager.all_steps():
            if found is not None and step > found.step:
                self._manager.delete(step)
        return found

    def _drop_drafts(self) -> None:
        if processes.is_primary() and not is_bucket(self.directory):
            for draft in self.directory.glob("step_*.orbax-checkpoint-tmp*"):
                shutil.rmtree(draft, ignore_errors=True)


def update(checkpoint: Checkpoint, content: dict[str, Any]) -> Checkpoint:
    """Replaces the content of a checkpoint on disk in one rename; the arrays stay.

    Raises:
        UserError: The disk is full or the folder cannot be written. The earlier record stands.
    """

    def replace() -> None:
        try:
            files = json.loads((checkpoint.path / RECORD_NAME).read_text())["files"]
            _write_record(checkpoint._replace(content=content), files)
        except OSError as error:
            raise _storage_error(error, checkpoint.path.parent, checkpoint.step, there=True) from error

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
            raise UserError(
                f"all checkpoints in {directory} are damaged; delete the folder to start the run again"
            )
        return None

    step = run_on_primary(find)
    return None if step is None else read(directory, step, verify=False)


def read(directory: Path, step: int, *, verify: bool = True) -> Checkpoint:
    """Reads the record of a checkpoint and, unless `verify` is False, compares every file of the state with it.

    Raises:
        DamagedError: A file is missing, cut short, altered or added.
        UserError: A newer version of mpisjax wrote it.
    """
    path = _path(directory, step)
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
    if version not in (1, FORMAT):
        raise UserError(
            f"{path} has checkpoint format {version}, not {FORMAT}; use the version that wrote it"
        )
    digests = _digests(path / STATE_NAME) if verify else files
    for name in sorted(files.keys() | digests.keys()):
        if not name.endswith(COMMIT_NAME) and files.get(name) != digests.get(name):
            wrong = "has been cut short or altered" if name in digests else "is missing"
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
    shapes, misfit = packing.saved_shapes(checkpoint.layout, template)
    if misfit is not None:
        raise UserError(
            f"{checkpoint.path} does not fit the training state of this config: state{misfit}; use the config and the "
            "version of mpisjax that wrote it"
        )
    path = _absolute(checkpoint.path / STATE_NAME)
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        if checkpoint.one_piece:
            arrays = packing.unpack(checkpointer.restore(path), shapes)
        else:
            how = ocp.checkpoint_utils.construct_restore_args(shapes)
            arrays = checkpointer.restore(path, shapes, restore_args=how)
    return packing.with_keys(arrays, template, checkpoint.key_impls)


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def _absolute(path: Path) -> Path:
    """Orbax takes no other path; an address in a bucket is one."""
    return path if is_bucket(path) else path.absolute()


def _digests(state: Any, sync: bool = False) -> dict[str, str]:
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
