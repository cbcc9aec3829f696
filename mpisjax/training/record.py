"""What a run's checkpoints say beside the arrays: its config, its data, and how far the loop has come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from mpisjax import configuration
from mpisjax.errors import UserError
from mpisjax.training import checkpoints, upkeep
from mpisjax.training.checkpoints import Checkpoint, DamagedError

FOLDER = "checkpoints"

# Keys that leave the trajectory as it is: where files lie, how often something is written, when to give up.
# Data that come from another place must still be the same data: their checksum is compared. `train.epochs` is
# not among them, since the learning rate's schedule depends on it from the first step on.
FREE_KEYS = (
    "name",
    "data.dir",
    "data.cache_dir",
    "data.source",
    "devices.all_cores",
    "devices.model_parallel",
    "eval.batch_size",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_skipped",
    "train.test_at_end",
)
_log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far the loop has come; all of it JSON.

    Attributes:
        validated_step: The last step whose state was validated, 0 for none.
        validation: What was measured there.
        best_step: The step with the best validation accuracy so far, of equals the one with the lower loss; 0
            for none.
        best_accuracy: That accuracy.
        best_loss: The validation loss there.
        metrics_length: Bytes of `metrics.jsonl` that belong to the run so far.
        pending: Metrics of the steps since the last row, one dict each.
        seconds: Wall-clock time spent so far, over all processes of the run.
        test: The test split's measurements once they are taken.
    """

    validated_step: int = 0
    validation: dict[str, Any] | None = None
    best_step: int = 0
    best_accuracy: float | None = None
    best_loss: float | None = None
    metrics_length: int = 0
    pending: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0
    test: dict[str, Any] | None = None


def environment() -> dict[str, Any]:
    """What bit-identical results depend on beside config and data."""
    devices, processes = jax.devices(), jax.process_count()
    several = {"processes": processes} if processes > 1 else {}
    return {"jax": jax.__version__, "platform": devices[0].platform, "devices": len(devices), **several}


def content(config: Any, data_checksum: str, progress: Progress) -> dict[str, Any]:
    """What to store with a checkpoint."""
    return {
        "config": configuration.to_plain(config),
        "data_checksum": data_checksum,
        "environment": environment(),
        "progress": progress._asdict(),
    }


def progress_of(checkpoint: Checkpoint) -> Progress:
    """The loop's part of a checkpoint."""
    stored = dict(checkpoint.content["progress"])
    return Progress(**{**stored, "pending": tuple(stored["pending"])})


def with_validation(progress: Progress, step: int, validation: dict[str, Any]) -> Progress:
    """The progress after `step` was validated; `accuracy` and `loss` decide whether it is the best so far."""
    progress = progress._replace(validated_step=step, validation=validation)
    accuracy, loss = validation["accuracy"], validation["loss"]
    better = progress.best_accuracy is None or accuracy > progress.best_accuracy
    if better or (
        accuracy == progress.best_accuracy and progress.best_loss is not None and loss < progress.best_loss
    ):
        progress = progress._replace(best_step=step, best_accuracy=accuracy, best_loss=loss)
    return progress


def check(checkpoint: Checkpoint, config: Any, data_checksum: str) -> None:
    """Makes sure that a checkpoint belongs to this config and these data.

    Raises:
        UserError: It does not; the sentence lists the keys that differ.
    """
    theirs, ours = _flat(checkpoint.content["config"]), _flat(configuration.to_plain(config))
    # A setting that is newer than the checkpoint stood, then, at what is now its default.
    defaults = _flat(configuration.to_plain(configuration.base()))
    theirs = {**{key: value for key, value in defaults.items() if key in ours}, **theirs}
    differing = [
        f"{key} ({_show(theirs, key)} there, {_show(ours, key)} here)"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in FREE_KEYS and (key not in theirs or key not in ours or theirs[key] != ours[key])
    ]
    if differing:
        raise UserError(
            f"{checkpoint.path} was written with another config, which differs in {', '.join(differing)}; "
            "use that config or another --workdir"
        )
    if checkpoint.content["data_checksum"] != data_checksum:
        raise UserError(
            f"{checkpoint.path} was written with other data (checksum {checkpoint.content['data_checksum'][:12]}, now "
            f"{data_checksum[:12]}); use those data or another --workdir"
        )
    if checkpoint.content["environment"] != environment():
        _log.warning(
            "the run stood on %s and goes on with %s: its figures will agree to rounding, not bit for bit",
            checkpoint.content["environment"],
            environment(),
        )


def best(workdir: Path) -> Checkpoint:
    """The checkpoint with the best validation accuracy; the newest where nothing was validated.

    Where that one is damaged a warning says so, and the best of the sound ones is taken.

    Raises:
        UserError: There is none, or all are damaged.
    """
    found = upkeep.found_by_first(lambda: _best(workdir))
    assert found is not None
    return found


def _best(workdir: Path) -> Checkpoint:
    directory = workdir / FOLDER
    latest = upkeep.newest_here(directory, set_aside=False)
    if latest is None:
        raise UserError(f"{workdir} holds no checkpoint; train first: python train.py --workdir {workdir}")
    progress = progress_of(latest)
    if progress.best_step in (0, latest.step):
        return latest
    try:
        return checkpoints.read(directory, progress.best_step)
    except DamagedError as error:
        _log.warning("the best checkpoint, of step %d, is damaged: %s", progress.best_step, error)
    sound = [latest]
    for step in checkpoints.steps(directory):
        try:
            sound.append(checkpoints.read(directory, step))
        except DamagedError:
            continue
    return max(sound, key=lambda one: (_accuracy(one), one.step))


def _accuracy(checkpoint: Checkpoint) -> float:
    progress = progress_of(checkpoint)
    validated_here = progress.validated_step == checkpoint.step and progress.validation
    return progress.validation["accuracy"] if validated_here and progress.validation else -1.0


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def _show(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
