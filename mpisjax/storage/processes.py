"""Several processes, one run: who they are, what the first does for all, and when they stop together.

Every process runs the same program on the same steps; arrays are global, and each process holds the parts that lie on
its own devices. The disk belongs to the first process: it takes the lock, reads and judges checkpoints, writes logs,
plots and metrics, and tells the others what it found. (Arrays of a checkpoint are the exception: every process reads
them, so that the run's folder must be one that all of them see.)

With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from mpisjax.errors import UserError

T = TypeVar("T")
HEARTBEAT_SECONDS = 60  # after so long without a sign of life a process counts as dead, and the others end
SHUTDOWN_SECONDS = 30  # how long a process that is done waits for the others
_log = logging.getLogger(__name__)


class CommonError(UserError):
    """A user error that every process raises at the same point, so that they can part in good order."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Makes this process one of several; call it before the first computation.

    Without arguments it does so only on a Cloud TPU VM, whose metadata say of how many hosts the slice is made.

    Args:
        coordinator: HOST:PORT where the first process listens; all processes must reach it.
        num_processes: How many processes there are.
        process_id: Which of them this is, from 0.
        heartbeat_seconds: After so long without a sign of life from a process, the others end.

    Raises:
        UserError: The three do not fit together, or the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if on_cloud_tpu():
            try:
                _initialize(heartbeat_seconds)
            except ValueError as error:
                # JAX found no cluster: chips without metadata, as in a container. They are then all there is.
                _log.info("one process: %s", error)
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator!r}: give HOST:PORT, such as 10.0.0.2:8476")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} of --num_processes {num_processes}: number the processes from 0 to "
            "--num_processes less 1"
        )
    if num_processes > 1:
        who = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        _initialize(heartbeat_seconds, **who)


def on_cloud_tpu() -> bool:
    """Whether TPU chips are attached to this machine and JAX may use them, other than through Colab."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if (asked and "tpu" not in asked) or any(name.startswith("COLAB_") for name in os.environ):
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _initialize(heartbeat_seconds: int, **who: Any) -> None:
    # Several CPU processes talk through gloo. Signals are ours (`preemption`), not the service's.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **who,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        raise UserError(
            f"process cannot join the others ({' '.join(str(error).split())[:300]}); check --coordinator, start every "
            "process within five minutes, and leave no earlier run behind"
        ) from error
    if not is_primary():
        logger = logging.getLogger("mpisjax")
        logger.setLevel(logging.ERROR)  # the first one tells what all of them see
        for handler in logger.handlers:
            handler.setFormatter(logging.Formatter(f"process {jax.process_index()}: %(message)s"))


def count() -> int:
    """How many processes there are."""
    # Asking JAX itself would make it look for devices, whose absence is told elsewhere.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process is the one that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def run_on_primary(fn: Callable[[], T]) -> T:
    """Lets the first process run `fn`, and gives its result to all; every process must call this at the same point.

    Args:
        fn: What to do; with several processes its result must be something that JSON can hold.

    Returns:
        What `fn` gave in the first process (tuples as lists, where there are several processes).

    Raises:
        CommonError: `fn` raised a `UserError`; with one process that error itself.
    """
    if count() == 1:
        return fn()
    caught: Exception | None = None
    answer: dict[str, Any] = {}
    if is_primary():
        try:
            answer = {"result": fn()}
        except Exception as error:
            caught = error
            said = str(error) if isinstance(error, UserError) else f"process 0 failed with {error!r}"
            answer = {"error": said}
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if caught is not None and not isinstance(caught, UserError):
        raise caught
    if "error" in answer:
        raise CommonError(answer["error"])
    return answer["result"]


def _broadcast(data: bytes) -> bytes:
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << max(length - 1, 1).bit_length(), np.uint8)  # few sizes, so that few are compiled
    if is_primary():
        padded[:length] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:length].astype(np.uint8))


def assert_equal_across_processes(what: str, value: str) -> None:
    """Makes sure that all processes have the same value of something.

    Raises:
        CommonError: They have not.
    """
    if count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint8).astype(np.int32)
    everyone = np.asarray(multihost_utils.process_allgather(digest)).reshape(count(), -1)
    other = [n for n in range(count()) if (everyone[n] != everyone[0]).any()]
    if other:
        raise CommonError(
            f"process {other[0]} has another {what} than process 0: start all processes with the same command, code "
            "and data"
        )


def to_host(tree: Any) -> Any:
    """Device arrays as whole host arrays, in every process; all of them must call this."""

    def one(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            assert isinstance(array.sharding, jax.sharding.NamedSharding)
            whole = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
            array = jax.jit(lambda a: a, out_shardings=whole)(array)
        return jax.device_get(array)

    return jax.tree.map(one, tree)


def to_devices(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A host array, the same in every process, onto devices; never an alias, so that a step may overwrite it."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding, may_alias=False)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].copy())


class Votes:
    """Finds out, step by step and without waiting, whether any process was asked to stop.

    A signal may reach one process alone, and not at the same moment; but all must stop after the same step. So every
    process votes with every step, and all read the same sum.
    """

    def __init__(self) -> None:
        spec = jax.sharding.PartitionSpec
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
        self._each = jax.sharding.NamedSharding(mesh, spec("all"))
        self._sum = jax.jit(lambda votes: votes.sum(), out_shardings=jax.sharding.NamedSharding(mesh, spec()))

    def cast(self, stop: bool) -> jax.Array:
        """Votes; gives the sum of all processes' votes, which may not be computed yet."""
        votes = jax.make_array_from_callback(
            (jax.device_count(),), self._each, lambda index: np.full(1, stop, np.int32)
        )
        return self._sum(votes)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that another process's end causes here, None for any other error."""
    text = " ".join(str(error).split())
    signs = ("Gloo", "gloo", "coordination service", "CoordinationService", "DEADLINE_EXCEEDED", "NCCL")
    if count() > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in signs):
        return (
            f"another process of this run has ended or cannot be reached ({text[:200]}); run the same command in all "
            "processes to go on from the last checkpoint"
        )
    return None


@contextlib.contextmanager
def exit_on_failure() -> Any:
    """Within, a process that fails alone ends at once, so that it keeps none of the others waiting."""
    try:
        yield
    except CommonError:
        raise
    except Exception as error:
        if count() > 1:
            sentence = explain(error) or (str(error) if isinstance(error, UserError) else None)
            if sentence is None:
                import traceback

                traceback.print_exc()
            else:
                print(f"error: {sentence}", file=sys.stderr)
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
                sys.stdout.flush()
            # Not `sys.exit`: JAX would wait for processes that wait for this one.
            os._exit(1)
        raise
