"""How a batch, and a training state, lie on the devices; `mpisjax.cpu.cores` settles which a CPU is split into."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from typing import Any

import jax
import numpy as np

from mpisjax.cpu.cores import jax_setting
from mpisjax.data.feed import put
from mpisjax.errors import UserError
from mpisjax.paths import cache_folder
from mpisjax.storage.processes import to_host


def data_mesh(batch_size: int, all_devices: bool = True, model_parallel: int = 1) -> jax.sharding.Mesh:
    """A mesh with an axis "data" over which the batch is split, as long as divides it evenly.

    With several processes it takes equally many devices of each.

    Args:
      batch_size: over all devices.
      all_devices: False takes one device (of each process).
      model_parallel: above 1 the mesh has a second axis, "model", of this length: so many neighbouring devices of one
        process share the channels of every layer.

    Raises:
      UserError: the devices cannot be divided like that.
    """
    processes = jax.process_count()
    devices = jax.devices() if all_devices or processes > 1 else jax.devices()[:1]
    if batch_size % processes:
        raise UserError(
            f"a batch size of {batch_size} cannot be shared by {processes} processes: use a multiple (of "
            "train.batch_size, over train.accumulate, and of eval.batch_size)"
        )
    local = len(devices) // processes if all_devices else 1
    if local % model_parallel:
        raise UserError(
            f"devices.model_parallel is {model_parallel}, but a process has {local} devices: choose a divisor of that"
        )
    groups = local // model_parallel
    groups = next(n for n in range(groups, 0, -1) if batch_size % (n * processes) == 0)
    shape: tuple[int, ...] = (groups * processes,)
    names: tuple[str, ...] = ("data",)
    if model_parallel > 1:
        shape, names = (*shape, model_parallel), (*names, "model")
    used = groups * model_parallel
    if used * processes == len(devices):
        # In the order in which neighbours are linked, where the platform knows it.
        types = (jax.sharding.AxisType.Auto,) * len(names)
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    chosen = [d for p in range(processes) for d in [d for d in devices if d.process_index == p][:used]]
    return jax.sharding.Mesh(np.asarray(chosen).reshape(shape), names)


def state_sharding(tree: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
    """Where each array of a training state, or of a network's variables, lies.

    Without an axis "model" every device has all of it. With one, the output channels of a layer are split over it if
    they are a multiple of its length: kernels, gains, scales, shifts and statistics, and what the optimiser and the
    averages keep for them. The dense classifier stays whole.

    Args:
      tree: arrays, or their shapes.
      mesh: the devices.

    Returns:
      The like, of shardings.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding_of(path, leaf, mesh), tree)


def _sharding_of(path: Any, leaf: Any, mesh: Any) -> jax.sharding.NamedSharding:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if "model" not in mesh.axis_names or len(names) < 2 or names[-2] == "classifier":
        return replicated(mesh)
    if names[-1] == "kernel" and leaf.ndim == 4:
        axis = 2 if names[-2].startswith("trans") else 3  # a transposed convolution's kernel is [k, k, out, in]
    elif names[-1] in ("gain", "bias", "scale", "mean", "var") and leaf.ndim == 1:
        axis = 0
    else:
        return replicated(mesh)
    if leaf.shape[axis] % mesh.shape["model"]:
        return replicated(mesh)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None,) * axis, "model"))


def shard_channels(net: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
    """The network with its currents split over the mesh's axis "model" by channel; itself without that axis."""
    if "model" not in mesh.axis_names:
        return net
    spec = jax.sharding.PartitionSpec("data", None, None, "model")
    return net.clone(sharding=jax.sharding.NamedSharding(mesh, spec))


def reshard(tree: Any, shardings: Any) -> Any:
    """Device arrays onto another arrangement of devices, over all processes.

    Args:
      tree: arrays, in every process.
      shardings: one of each, as a pytree.
    """

    def one(array: Any, sharding: jax.sharding.NamedSharding) -> Any:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if isinstance(array, jax.Array) and array.sharding.device_set == sharding.device_set:
            same = array.sharding.is_equivalent_to(sharding, array.ndim)
            return array if same else jax.jit(lambda a: a, out_shardings=sharding)(array)
        return put(to_host(array), sharding)

    return jax.tree.map(one, tree, shardings)


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
    if set_already := jax_setting("jax_compilation_cache_dir"):
        return str(set_already)
    folder = folder or str(cache_folder("compiled"))
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
    # A pointer, in the text of a program that calls `mpisjax.cpu`, is another one each time.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    return folder
