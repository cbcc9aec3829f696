"""Stride-1 convolutions with fewer multiplications, for CPUs: minimal filtering in both directions.

Four outputs of a filter of k taps need n = k + 3 multiplications instead of 4 k (Toom and Cook; S. Winograd,
"Arithmetic Complexity of Computations", 1980; A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016): `filter(d, g) = A [(G g) * (B d)]`. Applied to height and width a k x k convolution becomes
n^2 matrix products over its 4x4 tiles, with 4 times less arithmetic for k = 3 and 6.25 times for k = 5. A few
samples are done at a time, so that what lies between the three stages stays in the cache; that is where most
of the speed comes from.

Accuracy: the largest error of a 5x5 convolution of 64 channels is 1e-5 where its outputs have a deviation of
0.5 (float32); 2 to 3 times that of other ways to sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
_Shaped = jax.Array | jax.ShapeDtypeStruct
_OUTPUTS = 4
_POINTS = {3: (0, 1, -1, 2, -2), 5: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))}  # and infinity
# Below so many channels the passes over memory cost more than the multiplications saved, by kernel size.
_LEAST_CHANNELS = {3: 32, 5: 16}
# Transformed kernels beyond so many bytes leave the cache: then a chunk has enough tiles to be worth a pass
# over them.
_LARGE_KERNELS, _TILES = 16 * 2**20, 64


@functools.cache
def _matrices(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [4, n], G [n, taps] and B [n, n], exact, then rounded."""
    points = [Fraction(p) for p in _POINTS[taps]]
    n = len(points) + 1

    def evaluation(coefficients: int) -> list[list[Fraction]]:
        """A polynomial's values at the points, and at infinity its leading coefficient."""
        finite = [[p**j for j in range(coefficients)] for p in points]
        return [*finite, [Fraction(int(j == coefficients - 1)) for j in range(coefficients)]]

    # Gauss and Jordan, on fractions: the interpolation is the inverse of the evaluation.
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(evaluation(n))]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for r in range(n):
            if r != i and rows[r][i]:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    interpolation = np.array([[float(v) for v in row[n:]] for row in rows])
    # Filtering is the transpose of polynomial multiplication.
    a, g = (np.array([[float(v) for v in row] for row in evaluation(m)]) for m in (_OUTPUTS, taps))
    return a.T, g, interpolation.T


def _tiles(size: int) -> int:
    return -(-size // _OUTPUTS)


def worthwhile(x: _Shaped, w: _Shaped, stride: int) -> bool:
    """Whether a CPU convolves `x` [batch, height, width, in] with `w` [k, k, in, out] faster this way."""
    k = w.shape[0]
    if stride != 1 or w.shape[1] != k or k not in _POINTS or jnp.finfo(x.dtype).bits < 32:
        return False
    if not all(isinstance(n, int) for n in x.shape):  # an export for any batch: there is nothing to divide into chunks
        return False
    height, width = x.shape[1:3]
    usual = height * width * k**2
    ours = _tiles(height) * _tiles(width) * (k + _OUTPUTS - 1) ** 2
    return min(w.shape[2:]) >= _LEAST_CHANNELS[k] and usual >= 2 * ours


def worthwhile_gradient(x: _Shaped, w: _Shaped, stride: int) -> bool:
    """The same for `kernel_gradient`, which passes over all transformed kernels for every chunk."""
    size = (w.shape[0] + _OUTPUTS - 1) ** 2 * math.prod(w.shape[2:]) * w.dtype.itemsize
    return worthwhile(x, w, stride) and size <= _LARGE_KERNELS


def kernels(w: Array) -> Array:
    """What `convolve` takes instead of `w` [k, k, in, out]: [n^2, in, out]."""
    g = jnp.asarray(_matrices(w.shape[0])[1], w.dtype)
    both = jnp.einsum("ai,bj,ijcd->bacd", g, g, w, precision=lax.Precision.HIGHEST)
    return both.reshape(-1, *w.shape[2:])


def _combine(matrix: np.ndarray, terms: Sequence[Array], axis: int) -> Array:
    """The matrix times the terms, its rows stacked on `axis`. Zeros and ones cost nothing."""

    def row(weights: np.ndarray) -> Array:
        parts = [t if c == 1 else t * float(c) for c, t in zip(weights, terms, strict=True) if c]
        return functools.reduce(jnp.add, parts)

    return jnp.stack([row(weights) for weights in matrix], axis)


def _samples_at_a_time(x: Array, tiles: int) -> int:
    """A divisor of the batch, with at least so many tiles a device.

    The samples of a chunk are spread over the batch, so that each device has its share of them.
    """
    batch, height, width = x.shape[:3]
    each = -(-tiles // (_tiles(height) * _tiles(width)))
    wanted = min(batch, each * jax.local_device_count())
    return next(n for n in range(wanted, batch + 1) if batch % n == 0)


def _in_chunks(fn: Callable[..., Array], out: Array | None, chunk: int, *arrays: Array) -> Array:
    """Applies `fn` to `chunk` samples of the arrays at a time, and sums into `out`; None stacks."""
    batch = arrays[0].shape[0]
    count = batch // chunk
    split = [a.reshape(chunk, count, *a.shape[1:]) for a in arrays]

    def part(i: Array | int) -> Array:
        return fn(*(lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in split))

    if out is not None:
        return lax.fori_loop(0, count, lambda i, total: total + part(i), out)
    shape = jax.eval_shape(part, 0)
    stacked = jnp.zeros((chunk, count, *shape.shape[1:]), shape.dtype)
    stacked = lax.fori_loop(0, count, lambda i, all_: lax.dynamic_update_index_in_dim(all_, part(i), i, 1), stacked)
    return stacked.reshape(batch, *shape.shape[1:])


def _input_points(x: Array, k: int) -> Array:
    """B d in both directions: [batch, h, w, c] -> [n (columns), n (rows), batch, tile rows, columns, c]."""
    (batch, height, width, channels), half, b = x.shape, k // 2, _matrices(k)[2]
    rows, columns = _tiles(height), _tiles(width)
    padded = jnp.pad(
        x,
        (
            (0, 0),
            (half, _OUTPUTS * (rows + 1) - height - half),
            (half, _OUTPUTS * (columns + 1) - width - half),
            (0, 0),
        ),
    )
    blocks = padded.reshape(batch, rows + 1, _OUTPUTS, columns + 1, _OUTPUTS, channels)

    def shifted(i: int, size: int) -> tuple[slice, int]:
        return slice(i // _OUTPUTS, i // _OUTPUTS + size), i % _OUTPUTS

    n = k + _OUTPUTS - 1
    high = []
    for i in range(n):
        tiles, within = shifted(i, rows)
        high.append(blocks[:, tiles, within])
    by_row = _combine(b, high, 0)  # [n, batch, tile rows, columns + 1, 4, c]
    wide = []
    for j in range(n):
        tiles, within = shifted(j, columns)
        wide.append(by_row[:, :, :, tiles, within])
    return _combine(b, wide, 0)


def convolve(x: Array, kernels: Array, kernel_size: int) -> Array:
    """A stride-1 "same" convolution.

    Args:
      x: [batch, height, width, in].
      kernels: what the function `kernels` gave: [n^2, in, out].
      kernel_size: k of the kernel they were made from.

    Returns:
      [batch, height, width, out].
    """
    a = _matrices(kernel_size)[0]
    height, width = x.shape[1:3]
    channels = kernels.shape[-1]

    def some(x: Array) -> Array:
        points = _input_points(x, kernel_size)
        n, _, batch, rows, columns, _ = points.shape
        products = lax.dot_general(
            points.reshape(n * n, batch * rows * columns, -1), kernels, (((2,), (1,)), ((0,), (0,)))
        ).reshape(n, n, batch, rows, columns, channels)
        by_row = _combine(a, list(products), 4)  # [n, batch, tile rows, tile columns, 4, out]
        out = _combine(a, list(by_row), 2)  # [batch, tile rows, 4, tile columns, 4, out]
        return out.reshape(batch, rows * _OUTPUTS, columns * _OUTPUTS, channels)[:, :height, :width]

    large = kernels.size * kernels.dtype.itemsize > _LARGE_KERNELS
    return _in_chunks(some, None, _samples_at_a_time(x, _TILES if large else 1), x)


def kernel_gradient(x: Array, g: Array, kernel_size: int) -> Array:
    """d<g, conv(x, w)>/dw: the same three stages, transposed.

    Args:
      x: [batch, height, width, in].
      g: [batch, height, width, out].
      kernel_size: k.

    Returns:
      [k, k, in, out].
    """
    a, to_points, _ = _matrices(kernel_size)
    n, channels = a.shape[1], (x.shape[-1], g.shape[-1])

    def some(x: Array, g: Array) -> Array:
        points = _input_points(x, kernel_size)
        _, _, batch, rows, columns, _ = points.shape
        padding = [(0, t * _OUTPUTS - m) for t, m in zip((rows, columns), g.shape[1:3], strict=True)]
        tiles = jnp.pad(g, ((0, 0), *padding, (0, 0))).reshape(batch, rows, _OUTPUTS, columns, _OUTPUTS, channels[1])
        by_row = _combine(a.T, [tiles[:, :, i] for i in range(_OUTPUTS)], 0)
        spread = _combine(a.T, [by_row[:, :, :, :, j] for j in range(_OUTPUTS)], 0)
        return lax.dot_general(
            points.reshape(n * n, groups, -1, channels[0]),
            spread.reshape(n * n, groups, -1, channels[1]),
            (((2,), (2,)), ((0, 1), (0, 1))),
        )

    chunk = _samples_at_a_time(x, max(_TILES, *channels))
    # Each device sums its own samples; they are added up once, at the end.
    groups = math.gcd(chunk, jax.local_device_count())
    total = jnp.zeros((n * n, groups, *channels), x.dtype)
    total = _in_chunks(some, total, chunk, x, g).sum(1).reshape(n, n, *channels)
    matrix = jnp.asarray(to_points, x.dtype)
    return jnp.einsum("ai,bj,bacd->ijcd", matrix, matrix, total, precision=lax.Precision.HIGHEST)
