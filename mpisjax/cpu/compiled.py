"""The convolutions of `convolutions.cc`, `gradients.cc` and `filtering.cc` as functions of JAX arrays.

Several devices split them by batch. They have no derivatives and no rule for `vmap` of their own: the
primitives of `mpisjax.nn.convolution`, which call them, have those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from mpisjax.cpu.library import CONVOLVE, FILTER, KERNEL_GRADIENT, available, fingerprint, threads

Array = jax.Array
Pair = tuple[int, int]
# Outputs are computed in multiples of so many channels; from half of that on, that is worth it.
_CHANNELS = 16
_FEWEST = 8


def serves(dtype: Any, channels: Iterable[int]) -> bool:
    """Whether layers in `dtype` with so many output channels can be convolved here.

    Whether this machine has the compiled convolutions at all is `mpisjax.cpu.enabled`.
    """
    return jnp.dtype(dtype) == jnp.float32 and all(c >= _FEWEST for c in channels)


def convolve(x: Array, w: Array, stride: int, dilation: int, low: Pair, size: Pair) -> Array:
    """`y[o] = sum_k z[stride * o + k - low] w[k]`, where z is x with `dilation` - 1 zeros between its pixels.

    Args:
      x: float32 [batch, height, width, in].
      w: float32 [k, k, in, out].
      stride: 1, or any with a dilation of 1.
      dilation: 1, or any with a stride of 1.
      low: rows and columns of zeros before z; behind it there are as many as the outputs ask for.
      size: (rows, columns) of the output.

    Returns:
      float32 [batch, *size, out].
    """

    def local(x: Array, w: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((x.shape[0], *size, w.shape[3]), x.dtype)
        return jax.ffi.ffi_call(CONVOLVE, out)(x, w, numbers)

    rule = "b h w i, k l i o, s -> b p q o"
    return _split(local, rule, "hwiklospq", _by_batch(local), x, w, (stride, dilation, *low))


def kernel_gradient(x: Array, g: Array, kernel: Pair, stride: int, low: Pair) -> Array:
    """The derivative of `sum(g * convolve(x, w, stride, 1, low, ...))` with respect to w.

    Args:
      x: float32 [batch, height, width, in].
      g: float32 [batch, rows, columns, out].
      kernel: (rows, columns) of w.
      stride: of the convolution.
      low: as for `convolve`.

    Returns:
      float32 [*kernel, in, out].
    """

    def local(x: Array, g: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((*kernel, x.shape[3], g.shape[3]), x.dtype)
        return jax.ffi.ffi_call(KERNEL_GRADIENT, out)(x, g, numbers)

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        axes = _batch_axes(arguments[0])
        rows, whole = NamedSharding(mesh, PartitionSpec(axes)), NamedSharding(mesh, PartitionSpec())

        def summed(x: Array, g: Array, numbers: Array) -> Array:
            # With explicit axes in sight, JAX writes a sharding into the sum's computation, which XLA does
            # not take.
            with use_abstract_mesh(AbstractMesh((), ())):
                return lax.psum(local(x, g, numbers), axes)

        return mesh, summed if axes else local, whole, (rows, rows, whole)

    rule = "b h w i, b p q o, s -> k l i o"
    return _split(local, rule, "hwipqoskl", partition, x, g, (stride, *low))


def filtered(x: Array, kernels: Array) -> Array:
    """`mpisjax.cpu.winograd.convolve`: a stride-1 "same" convolution with fewer multiplications.

    Args:
      x: float32 [batch, height, width, in].
      kernels: float32 [n^2, in, out], as `winograd.kernels` makes them of a kernel with 3 or 5 taps a side.

    Returns:
      float32 [batch, height, width, out].
    """

    def local(x: Array, kernels: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((*x.shape[:3], kernels.shape[2]), x.dtype)
        return jax.ffi.ffi_call(FILTER, out)(x, kernels, numbers)

    ins, outs = (-n % _CHANNELS for n in kernels.shape[1:])
    if ins or outs:
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, ins)])
        padded = jnp.pad(kernels, [(0, 0), (0, ins), (0, outs)])
        return filtered(x, padded)[..., : kernels.shape[2]]
    return _split(local, "b h w i, n i o, s -> b h w o", "hwinos", _by_batch(local), x, kernels, ())


def _threads() -> int:
    """How many threads share a batch. Several host devices have one thread each."""
    return threads() if jax.local_device_count() == 1 else 1


def _batch_axes(argument: Any) -> Any:
    spec = argument.sharding.spec
    return spec[0] if len(spec) else None


def _by_batch(local: Any) -> Any:
    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        rows = NamedSharding(mesh, PartitionSpec(_batch_axes(arguments[0])))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, local, rows, (rows, whole, whole)

    return partition


def _split(
    local: Callable[[Array, Array, Array], Array],
    rule: str,
    whole: str,
    partition: Any,
    a: Array,
    b: Array,
    numbers: tuple[int, ...],
) -> Array:
    """`local(a, b, numbers)`, split over devices by the factor "b" of `rule`. The factors `whole` stay whole.

    The numbers that a convolution is told (a version, the number of threads, and `numbers`) come as an array.
    A partitioned function is not in the program's text but behind a pointer. JAX's compilation cache has to
    overlook that pointer (`mpisjax.training.devices.compilation_cache`), and would take one function for
    another.
    """
    available()  # XLA must know the targets
    operation = custom_partitioning(local)
    operation.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole))
    # Of literals: arrays that a program closes over come in another order each time it is traced.
    parts = [lax.broadcast(np.int32(n), (1,)) for n in (fingerprint(), _threads(), *numbers)]
    return operation(a, b, lax.concatenate(parts, 0))
