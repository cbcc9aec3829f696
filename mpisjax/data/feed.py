"""The order of the examples, a matter of the seed alone, and their batches on the devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.data.dataset import Batch, Split, permutation
from mpisjax.errors import UserError

DEVICE_SHARE = 4  # a split goes to the accelerator if it takes at most 1 / DEVICE_SHARE of its memory


class Feed:
    """The training batches, each a function of (seed, step).

    On an accelerator the whole split is kept on every device as uint8 if it takes at most a quarter of its memory, and
    a batch is gathered there, so that only its indices travel. On a CPU, or if the split is larger, batches are
    gathered (and event frames unpacked) on the host: a second copy in the same memory would gain nothing.

    Args:
        split: The train split.
        batch_size: The global batch size.
        seed: The seed of the order.
        sharding: How batches lie on the devices (their leading axis split over them); None is the default device.
        on_device: Whether to keep the split on the devices; None decides as above.

    Attributes:
        steps_per_epoch: Whole batches in an epoch.
        on_device: Whether the split is kept on the devices.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(split.labels), batch_size)
        self._split, self._batch_size, self._seed, self._sharding = split, batch_size, seed, sharding
        check_divides(batch_size, sharding)
        self.on_device = fits(split, sharding) if on_device is None else on_device
        if self.on_device:
            whole = replicated(sharding)
            self._images, self._labels = put((np.asarray(split.images[:]), split.labels), whole)
            self._gather = jax.jit(_gather, out_shardings=sharding) if sharding is not None else jax.jit(_gather)
        self._mask = put(np.ones(batch_size, np.float32), sharding)

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Args:
            step: The step, counted from 0 over all epochs.

        Returns:
            A batch on the devices, its mask all ones.
        """
        indices = train_indices(self._seed, step, len(self._split.labels), self._batch_size)
        if self.on_device:
            placed = put(indices.astype(np.int32), replicated(self._sharding))
            images, labels = self._gather(self._images, self._labels, placed)
        else:
            images, labels = put_rows(self._split, indices, self._sharding)
        return Batch(images, labels, self._mask)


def eval_batches(split: Split, batch_size: int, sharding: jax.sharding.Sharding | None = None) -> Iterator[Batch]:
    """The batches of an evaluation, in the split's order.

    Args:
        split: What to evaluate on.
        batch_size: The global batch size.
        sharding: How batches lie on the devices; None is the default device.

    Yields:
        Batches of `batch_size`, the last one filled up with zero images whose mask is 0.
    """
    check_divides(batch_size, sharding)
    size = len(split.labels)
    for start in range(0, size, batch_size):
        images = np.asarray(split.images[start : start + batch_size])
        labels = split.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        mask = np.ones(batch_size, np.float32)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
            labels = np.concatenate([labels, np.zeros(missing, labels.dtype)])
            mask[-missing:] = 0
        yield Batch(*put((images, labels, mask), sharding))


def put(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Host arrays, the same in every process, onto devices; each process copies only what its devices hold."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), sharding, lambda index: np.asarray(a)[index]),
        tree,
    )


def put_rows(split: Split, indices: np.ndarray, sharding: jax.sharding.Sharding | None) -> Any:
    """Examples of a split onto devices: `(images, labels)`; each process reads only its own share of them."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put((np.asarray(split.images[indices]), split.labels[indices]), sharding)

    def read(source: Any, tail: tuple[int, ...]) -> jax.Array:
        return jax.make_array_from_callback(
            (len(indices), *tail),
            sharding,
            lambda index: np.asarray(source[indices[index[0]]]),  # type: ignore[index]
        )

    return read(split.images, tuple(split.images.shape[1:])), read(split.labels, ())


def _gather(images: jax.Array, labels: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.take(images, indices, 0), jnp.take(labels, indices, 0)


def replicated(sharding: jax.sharding.Sharding | None) -> Any:
    """A placement with a whole copy on each of the sharding's devices."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def check_divides(batch_size: int, sharding: jax.sharding.Sharding | None) -> None:
    """Refuses a batch size that the devices cannot share evenly.

    Raises:
        UserError: In that case, or if the batch size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}, but must be 1 or more")
    if sharding is None:
        return
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        count = len(sharding.device_set)
        raise UserError(f"a batch size of {batch_size} cannot be shared by {count} devices: use a multiple") from error


def fits(split: Split, sharding: jax.sharding.Sharding | None) -> bool:
    """Whether to keep a split on the devices: accelerators only, and at most 1 / `DEVICE_SHARE` of their memory."""
    devices: list[Any] = [jax.devices()[0]] if sharding is None else list(sharding.device_set)
    size = int(np.prod(split.images.shape, dtype=np.int64))
    for device in devices:
        if device.platform == "cpu":
            return False
        stats = device.memory_stats() or {}
        if size * DEVICE_SHARE > stats.get("bytes_limit", 0):
            return False
    return True


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    order = permutation(seed, epoch, size)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """How many whole batches an epoch has; the rest of the epoch's permutation is dropped.

    Raises:
        UserError: If there is not even one.
    """
    if batch_size < 1 or batch_size > num_examples:
        raise UserError(
            f"train.batch_size is {batch_size}, but must be 1 to {num_examples}: there are {num_examples} train "
            "examples"
        )
    return num_examples // batch_size


def train_indices(seed: int, step: int, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of a training step, from (seed, step) alone.

    Every epoch is a new permutation of the examples; what is left over at its end, less than a batch, is dropped.

    Args:
        seed: The run's seed.
        step: The step, counted from 0 over all epochs.
        num_examples: The size of the train split.
        batch_size: The (global) batch size.

    Returns:
        int64 [batch_size], read-only.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    epoch, place = divmod(step, steps)
    return _epoch(seed, epoch, num_examples)[place * batch_size : (place + 1) * batch_size]
