"""Which examples are trained on, validated on and tested on, and in which order: a matter of seeds alone."""

from __future__ import annotations

import functools

import numpy as np

from mpisjax.errors import UserError


def permutation(seed: int, number: int, size: int) -> np.ndarray:
    """A permutation that depends on its arguments and on nothing else.

    Philox is a counter-based generator: keyed by (seed, number), it needs no state to be kept or restored. The raw
    numbers are sorted, rather than `Generator.permutation` be called, as NumPy promises the same raw numbers in every
    version but not the same permutation, and a run resumed after an upgrade must go on in the same order.

    Args:
        seed: The seed of the run or of the split, non-negative.
        number: Which of the seed's permutations, e.g. the epoch.
        size: How many elements.

    Returns:
        int64 [size].
    """
    if seed < 0:
        raise UserError(f"a seed must be 0 or more, not {seed}: set seed and data.split_seed to 0 or more")
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, number], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def hold_out(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `count` examples, each class in proportion to its size.

    Args:
        labels: int [N], the classes.
        count: How many examples to hold out, 0 to N - 1.
        seed: The split is a function of the labels, the count and this.

    Returns:
        (kept, held out), sorted int64 indices.

    Raises:
        UserError: If `count` leaves nothing to train on, or is negative.
    """
    size = len(labels)
    if not 0 <= count < size:
        raise UserError(
            f"data.num_validation is {count}, but must be 0 to {size - 1}: the train split has {size}"
        )
    order = permutation(seed, 0, size)
    place = np.empty(size)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(
            members
        )  # evenly spread, so every prefix is balanced
    chosen = np.zeros(size, bool)
    chosen[order[np.argsort(place[order], kind="stable")][:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


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
            f"train.batch_size is {batch_size}, but must be 1 to {num_examples}: there are {num_examples} train examples"
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


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """How many examples each class has."""
    return np.bincount(labels, minlength=num_classes).tolist()
