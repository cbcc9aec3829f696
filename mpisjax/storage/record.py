"""What a run's checkpoints say beside the arrays: what the run is made of, and how far it has come."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints
from mpisjax.storage.checkpoints import FOLDER, Checkpoint, DamagedError
from mpisjax.storage.processes import run_on_primary
from mpisjax.storage.run_folder import path_of

# Settings that leave the trajectory as it is: where files lie, how often something is written, when to give up.
# Data that come from another place must still be the same data: their checksum is compared. `train.epochs` is
# not among them, since the learning rate's schedule depends on it from the first step on. A run that is complete may
# have it raised.
FREE_KEYS = (
    "name",
    "data.dir",
    "data.cache_dir",
    "data.source",
    "devices.all_cores",
    "devices.model_parallel",
    "eval.batch_size",
    "forward.residual_tol",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_skipped",
    "train.patience",
    "train.test_at_end",
)
_log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """What a run is made of. A checkpoint of another origin is refused.

    Attributes:
        config: All settings as JSON gives them (`mpisjax.configuration.to_plain`).
        defaults: The settings' defaults. A setting that a checkpoint does not know yet stood at its default.
        data_checksum: Identifies the data.
        about: What else to know of the run, as JSON; it is kept, and not compared.
    """

    config: dict[str, Any]
    defaults: dict[str, Any]
    data_checksum: str
    about: Mapping[str, Any] = {}


class Progress(NamedTuple):
    """How far a run has come; all of it JSON.

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
        ended: Whether `on_epoch` has ended the training.
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
    ended: bool = False

    def with_validation(self, step: int, validation: dict[str, Any]) -> Progress:
        """The progress after `step` was validated; `accuracy` and `loss` decide whether it is the best so far."""
        progress = self._replace(validated_step=step, validation=validation)
        accuracy, loss = validation["accuracy"], validation["loss"]
        if self.best_accuracy is None or (accuracy, -loss) > (self.best_accuracy, -(self.best_loss or 0.0)):
            progress = progress._replace(best_step=step, best_accuracy=accuracy, best_loss=loss)
        return progress


def content(origin: Origin, progress: Progress) -> dict[str, Any]:
    """What to store with a checkpoint."""
    return {
        "config": origin.config,
        "data_checksum": origin.data_checksum,
        **({"about": origin.about} if origin.about else {}),
        "environment": environment(),
        "progress": progress._asdict(),
    }


def progress_of(checkpoint: Checkpoint) -> Progress:
    """The progress that a checkpoint was stored with."""
    stored = dict(checkpoint.content["progress"])
    return Progress(**{**stored, "pending": tuple(stored["pending"])})


def environment() -> dict[str, Any]:
    """What bit-identical results depend on beside config and data."""
    devices, processes = jax.devices(), jax.process_count()
    several = {"processes": processes} if processes > 1 else {}
    return {"jax": jax.__version__, "platform": devices[0].platform, "devices": len(devices), **several}


def check(checkpoint: Checkpoint, origin: Origin, steps_per_epoch: int) -> bool:
    """Makes sure that a checkpoint belongs to this config and these data.

    Args:
        checkpoint: The newest of the run.
        origin: What the run is made of now.
        steps_per_epoch: Steps of one epoch.

    Returns:
        Whether the run was complete, and goes on because `train.epochs` has been raised.

    Raises:
        UserError: It does not; the sentence lists the settings that differ.
    """
    theirs, ours, defaults = (
        flatten_dict(tree, sep=".") for tree in (checkpoint.content["config"], origin.config, origin.defaults)
    )
    theirs = {**{key: value for key, value in defaults.items() if key in ours}, **theirs}
    keys = [
        key
        for key in sorted(theirs.keys() | ours.keys())
        if key not in FREE_KEYS and (key not in theirs or key not in ours or theirs[key] != ours[key])
    ]
    progress, longer = progress_of(checkpoint), False
    if keys == ["train.epochs"]:  # a complete run may be given more
        before = theirs["train.epochs"]
        complete = checkpoint.step >= before * steps_per_epoch or progress.ended or progress.test is not None
        longer = complete and ours["train.epochs"] > before
    if keys and not longer:
        raise UserError(_refusal(checkpoint, keys, theirs, ours))
    if checkpoint.content["data_checksum"] != origin.data_checksum:
        raise UserError(
            f"{checkpoint.path} was written with other data (checksum {checkpoint.content['data_checksum'][:12]}, now "
            f"{origin.data_checksum[:12]}); use those data or another --workdir"
        )
    if longer:
        _log.warning(
            "the run was complete after %s epochs and goes on to %s: from here on the learning rate is that of the "
            "longer run, so the outcome is not that of %s epochs from the start",
            theirs["train.epochs"], ours["train.epochs"], ours["train.epochs"],
        )  # fmt: skip
    if checkpoint.content["environment"] != environment():
        _log.warning(
            "the run stood on %s and goes on with %s: its figures will agree to rounding, not bit for bit",
            checkpoint.content["environment"],
            environment(),
        )
    return longer


def _refusal(checkpoint: Checkpoint, keys: list[str], theirs: Any, ours: Any) -> str:
    """Which settings differ, what that means, and what to do."""
    shown = [[repr(flat[key]) if key in flat else "absent" for flat in (theirs, ours)] for key in keys]
    differing = ", ".join(f"{key} ({there} there, {here} here)" for key, (there, here) in zip(keys, shown, strict=True))
    run = checkpoint.path.parent.parent
    own = (
        f"use that config, or give this one a --workdir of its own, where train.init_from={run} starts from these "
        "weights"
    )
    if any(key.startswith("model.") for key in keys):
        own = "use that config, or another --workdir"
        meaning = (
            "the network is another one, so that even train.init_from cannot give it these weights unless all their "
            "shapes agree"
        )
    elif any(key.startswith("data.") for key in keys):
        meaning = "the rest of the run would see other examples"
    elif keys == ["train.epochs"]:
        meaning = (
            "the learning rate would follow another curve in the middle of the run; once it is complete, train.epochs "
            "can be raised"
        )
    else:
        meaning = "the rest of the run would be trained in another way than its beginning"
    return f"{checkpoint.path} was written with another config, which differs in {differing}; {own}: {meaning}"


def best(workdir: str | Path) -> Checkpoint:
    """The checkpoint with the best validation accuracy; the newest where nothing was validated.

    Where that one is damaged a warning says so, and the best of the sound ones is taken.

    Raises:
        UserError: There is none, or all are damaged.
    """
    directory = path_of(workdir) / FOLDER
    latest = checkpoints.newest(directory)
    if latest is None:
        raise UserError(f"{workdir} holds no checkpoint; train first: python train.py --workdir {workdir}")
    step = run_on_primary(lambda: _best_step(directory, latest))
    return checkpoints.read(directory, step, verify=False)


def _best_step(directory: Path, latest: Checkpoint) -> int:
    step = progress_of(latest).best_step
    if step in (0, latest.step):
        return latest.step
    try:
        return checkpoints.read(directory, step).step
    except DamagedError as error:
        _log.warning("the best checkpoint, of step %d, is damaged: %s", step, error)
    sound = [latest]
    for other in checkpoints.steps(directory):
        with contextlib.suppress(DamagedError):
            sound.append(checkpoints.read(directory, other))

    def accuracy(found: Checkpoint) -> float:
        progress = progress_of(found)
        here = progress.validation is not None and progress.validated_step == found.step
        return progress.validation["accuracy"] if here and progress.validation else -1.0

    return max(sound, key=lambda found: (accuracy(found), found.step)).step
