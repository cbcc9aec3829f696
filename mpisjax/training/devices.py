"""Which devices a program uses, and how the batch lies on them.

XLA:CPU runs a convolution on one core. So on a CPU the fast path is the data-parallel one: one host device a
core, the batch shared among them. Accelerators are left alone.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from typing import Any

import jax

from mpisjax.data.feed import put
from mpisjax.errors import UserError


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # JAX makes these attributes at run time; type checkers do not see them


def prepare(all_cores: bool = True) -> None:
    """Sets up JAX's CPU backend; call it before the first computation. No effect on accelerators.

    Several host devices can block one another's all-reduce for good when steps are dispatched asynchronously
    on a thread pool with one thread a core: each device may hold a thread that the other waits for. The cure is
    threefold: a pool with threads to spare (`PJRT_NPROC`), synchronous dispatch, and waiting for every step
    (`mpisjax.training.pipeline`).

    Args:
      all_cores: one host device a core. Where XLA_FLAGS or jax_num_cpu_devices already set a count, that
        count stays.
    """
    forced = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if all_cores and not forced and _setting("jax_num_cpu_devices") <= 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            jax.config.update("jax_num_cpu_devices", cores)
        except RuntimeError:  # a computation has run already: the devices are what they are
            return
    os.environ.setdefault("PJRT_NPROC", str(4 * (os.cpu_count() or 1)))
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def data_mesh(batch_size: int, all_devices: bool = True) -> jax.sharding.Mesh:
    """A mesh with one axis, "data", over as many devices as divide the batch evenly.

    With several processes it takes equally many devices of each.

    Raises:
      UserError: several processes cannot share the batch.
    """
    processes = jax.process_count()
    if processes == 1:
        devices = jax.devices() if all_devices else jax.devices()[:1]
    else:
        devices = jax.devices()
        if batch_size % processes:
            raise UserError(
                f"a batch size of {batch_size} cannot be shared by {processes} processes: use a multiple (of "
                "train.batch_size and of eval.batch_size)"
            )
    local = len(devices) // processes if all_devices else 1
    local = next(n for n in range(local, 0, -1) if batch_size % (n * processes) == 0)
    if local * processes == len(devices) and all_devices:
        # In the order in which neighbours are linked, where the platform knows it.
        axes = (jax.sharding.AxisType.Auto,)
        return jax.make_mesh((len(devices),), ("data",), axis_types=axes, devices=devices)
    chosen = [d for p in range(processes) for d in [d for d in devices if d.process_index == p][:local]]
    return jax.sharding.Mesh(chosen, ("data",))


def move(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Device arrays onto another arrangement of devices, over all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(array: Any) -> Any:
        if isinstance(array, jax.Array) and array.sharding.device_set == sharding.device_set:
            return array if array.sharding.is_equivalent_to(sharding, array.ndim) else spread(array)
        return put(fetch(array), sharding)

    spread = jax.jit(lambda array: array, out_shardings=sharding)
    return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
    """Device arrays as whole host arrays, in every process; all of them must call this."""

    def one(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            assert isinstance(array.sharding, jax.sharding.NamedSharding)
            whole = replicated(array.sharding.mesh)
            array = jax.jit(lambda a: a, out_shardings=whole)(array)
        return jax.device_get(array)

    return jax.tree.map(one, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The leading axis split over the mesh."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def replicated(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.sharding.NamedSharding:
    """A whole copy on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compilation_cache(folder: str | None = None) -> str:
    """Turns JAX's compilation cache on, in the user's cache folder; returns the folder.

    A folder set in JAX_COMPILATION_CACHE_DIR wins. Where the folder cannot be written, a warning says so and
    compiling is merely not remembered.
    """
    # A disk that fills up later is no reason for a warning a program.
    warnings.filterwarnings("ignore", message="Error (writing|reading) persistent compilation cache")
    if _setting("jax_compilation_cache_dir"):
        return str(_setting("jax_compilation_cache_dir"))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = folder or os.path.join(home, "mpisjax", "compiled")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logging.getLogger(__name__).warning(
            "the compilation cache %s cannot be written (%s), so programs are compiled anew each time; set "
            "XDG_CACHE_HOME to another folder to start faster",
            folder, error.strerror,
        )  # fmt: skip
        return ""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder
