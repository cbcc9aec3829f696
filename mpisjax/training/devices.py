"""Which devices a program uses, and how the batch lies on them.

XLA:CPU runs a convolution on one core. So on a CPU the fast path is the data-parallel one: one host device a
core, the batch shared among them. Accelerators are left alone.
"""

from __future__ import annotations

import os
from typing import Any

import jax


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
    """A mesh with one axis, "data", over as many local devices as divide the batch evenly."""
    devices = jax.devices() if all_devices else jax.devices()[:1]
    count = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
    return jax.sharding.Mesh(devices[:count], ("data",))


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The leading axis split over the mesh."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """A whole copy on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compilation_cache(folder: str | None = None) -> str:
    """Turns JAX's compilation cache on, in the user's cache folder; returns the folder.

    A folder set in JAX_COMPILATION_CACHE_DIR wins. Where the folder cannot be made, compiling is merely not
    remembered.
    """
    if _setting("jax_compilation_cache_dir"):
        return str(_setting("jax_compilation_cache_dir"))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = folder or os.path.join(home, "mpisjax", "compiled")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return ""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder
