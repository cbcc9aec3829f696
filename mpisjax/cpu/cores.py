"""How the cores of a CPU share a batch. This has to be settled before JAX looks for its devices.

XLA:CPU runs a convolution of its own on one core. There are two ways round that. Where the compiled
convolutions serve the whole network (`mpisjax.cpu.compiled.serves`), there is one host device: they share a
batch among the threads of XLA's pool, as XLA does with everything elementwise. Elsewhere there is one host
device a core, and the batch is split over them. The first way is faster (docs/speed.md): no device waits for
another, and there are no more threads than cores.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import jax

from mpisjax.cpu import allocator, library


def jax_setting(name: str) -> Any:
    """What JAX is set to. It makes these attributes at run time, so that type checkers do not see them."""
    return getattr(jax.config, name)


def prepare(*, served: bool = True, all_cores: bool = True) -> None:
    """Sets up JAX's CPU backend. Call it before the first computation; it has no effect on accelerators.

    Several host devices can block one another's all-reduce for good when steps are dispatched asynchronously
    on a thread pool with one thread a core: each device may hold a thread that the other waits for. The cure
    is threefold: a pool with threads to spare (`PJRT_NPROC`), synchronous dispatch, and waiting for every
    step (`mpisjax.training.step_runner`). Threads to spare cost time, a third of a training step of the
    Fashion-MNIST config.

    Args:
      served: the compiled convolutions serve the whole network, and its channels are not split over devices.
      all_cores: use all cores of a CPU; False keeps to one.
    """
    allocator.trim_after_compiling()
    forced = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    several = forced or jax_setting("jax_num_cpu_devices") > 0
    if not several and not all_cores:
        os.environ.setdefault("PJRT_NPROC", "1")
    elif not several and not (served and _on_a_cpu() and library.available()):
        several = True
        try:
            jax.config.update("jax_num_cpu_devices", library.cores())
        except RuntimeError:  # a computation has run already: the devices are what they are
            return
    if several:
        os.environ.setdefault("PJRT_NPROC", str(4 * (os.cpu_count() or 1)))
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _on_a_cpu() -> bool:
    """Whether JAX will take the CPU, as far as that can be known before it looks."""
    if asked := jax_setting("jax_platforms"):
        return asked.split(",")[0] == "cpu"
    return not (
        importlib.util.find_spec("jax_plugins")
        or importlib.util.find_spec("libtpu")
        or importlib.metadata.entry_points(group="jax_plugins")
    )
