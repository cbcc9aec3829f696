"""The convolutions of `convolutions.cc`, `gradients.cc` and `filtering.cc` as JAX operations.

They can be differentiated and mapped over by `vmap`, and are split over devices by batch.

Derivatives of these are taken of the same map in XLA's own operations (`mpisjax.nn.convolution` has derivatives of its own for what
training needs; this serves second ones).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mpisjax.cpu import winograd
from mpisjax.cpu.library import CONVOLVE, FILTER, KERNEL_GRADIENT, available, enabled, fingerprint, threads

Array = jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Outputs are computed in multiples of so many channels; from half of that on, that is worth it.
_CHANNELS = 16
_FEWEST = 8
Pair = tuple[int, int]


def supports(x: Array | jax.ShapeDtypeStruct, w_shape: tuple[int, ...]) -> bool:
    """Whether an x [batch, height, width, in] may be convolved here with a kernel [k, k, in, out] of that shape."""
    return (
        x.dtype == jnp.float32
        and all(isinstance(n, int) for n in x.shape)  # an export may leave the batch open
        and 0 not in x.shape
        and w_shape[3] >= _FEWEST
        and enabled()
    )


def serves(channels: Iterable[int]) -> bool:
    """Whether all layers of so many channels are convolved here."""
    return all(c >= _FEWEST for c in channels)


def convolve(x: Array, w: Array, stride: int, dilation: int, low: Pair, size: Pair) -> Array:
    """`y[o] = sum_k z[stride * o + k - low] w[k]`, z being x with `dilation` - 1 zeros between its pixels.

    Args:
      x: float32 [batch, height, width, in].
      w: float32 [k, k, in, out].
      stride: 1, or any with a dilation of 1.
      dilation: 1, or any with a stride of 1.
      low: rows and columns of zeros before z; there are as many behind it as are met.
      size: of the output.

    Returns:
      float32 [batch, *size, out].
    """
    return _convolve(stride, dilation, low, size)(x, w)


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
    return _kernel_gradient(kernel, stride, low)(x, g)


def filtered(x: Array, kernels: Array, kernel_size: int) -> Array:
    """`winograd.convolve`: a stride-1 "same" convolution with fewer multiplications.

    Args:
      x: float32 [batch, height, width, in].
      kernels: float32 [n^2, in, out], as `winograd.kernels` makes them.
      kernel_size: 3 or 5.

    Returns:
      float32 [batch, height, width, out].
    """
    ins, outs = (-n % _CHANNELS for n in kernels.shape[1:])
    if ins or outs:
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, ins)])
        y = _filtered(kernel_size)(x, jnp.pad(kernels, [(0, 0), (0, ins), (0, outs)]))
        return y[..., : kernels.shape[2]]
    return _filtered(kernel_size)(x, kernels)


@functools.cache
def _filtered(kernel_size: int) -> Callable[[Array, Array], Array]:
    def native(x: Array, kernels: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((*x.shape[:3], kernels.shape[2]), x.dtype)
        return jax.ffi.ffi_call(FILTER, out)(x, kernels, numbers)

    def plain(x: Array, kernels: Array) -> Array:
        return winograd.convolve(x, kernels, kernel_size)

    split = _split(native, (), "b h w i, n i o, s -> b h w o", _by_batch(native), "hwinos")
    return _operation(split, plain, _many)


def _many(operation: Any, axis_size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
    """A convolution under `vmap`."""
    if batched[1]:  # each has a kernel of its own
        x = x if batched[0] else jnp.broadcast_to(x, (axis_size, *x.shape))
        return lax.map(lambda pair: operation(*pair), (x, w)), True
    y = operation(x.reshape(-1, *x.shape[2:]), w)
    return y.reshape(axis_size, -1, *y.shape[1:]), True


@functools.cache
def _convolve(stride: int, dilation: int, low: Pair, size: Pair) -> Callable[[Array, Array], Array]:
    def native(x: Array, w: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((x.shape[0], *size, w.shape[3]), x.dtype)
        return jax.ffi.ffi_call(CONVOLVE, out)(x, w, numbers)

    def plain(x: Array, w: Array) -> Array:
        return _in_xla(x, w, stride, dilation, low, size)

    numbers = (stride, dilation, *low)
    split = _split(native, numbers, "b h w i, k l i o, s -> b p q o", _by_batch(native), "hwiklospq")
    return _operation(split, plain, _many)


@functools.cache
def _kernel_gradient(kernel: Pair, stride: int, low: Pair) -> Callable[[Array, Array], Array]:
    def native(x: Array, g: Array, numbers: Array) -> Array:
        out = jax.ShapeDtypeStruct((*kernel, x.shape[3], g.shape[3]), x.dtype)
        return jax.ffi.ffi_call(KERNEL_GRADIENT, out)(x, g, numbers)

    def plain(x: Array, g: Array) -> Array:
        w = jnp.zeros((*kernel, x.shape[3], g.shape[3]), x.dtype)
        return jax.vjp(lambda w: _in_xla(x, w, stride, 1, low, (g.shape[1], g.shape[2])), w)[1](g)[0]

    def lower(axes: Any) -> Callable[[Array, Array, Array], Array]:
        def summed(x: Array, g: Array, numbers: Array) -> Array:
            # With explicit axes in sight, JAX writes a sharding into the sum's computation, which XLA does not take.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return lax.psum(native(x, g, numbers), axes)

        return summed if axes else native

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        axes = _batch_axes(arguments[0])
        rows = NamedSharding(mesh, PartitionSpec(axes))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, lower(axes), whole, (rows, rows, whole)

    split = _split(native, (stride, *low), "b h w i, b p q o, s -> k l i o", partition, "hwipqoskl")

    def many(operation: Any, axis_size: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        rows = [
            a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, is_batched in zip(arrays, batched, strict=True)
        ]
        return lax.map(lambda pair: operation(*pair), tuple(rows)), True

    return _operation(split, plain, many)


def _in_xla(x: Array, w: Array, stride: int, dilation: int, low: Pair, size: Pair) -> Array:
    padding = [
        (before, (m - 1) * stride + k - before - ((n - 1) * dilation + 1))
        for before, n, m, k in zip(low, x.shape[1:3], size, w.shape[:2], strict=True)
    ]
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, lhs_dilation=(dilation, dilation), dimension_numbers=_LAYOUT
    )


def _operation(native: Any, plain: Any, many: Any) -> Any:
    """`native` with derivatives, those of `plain`, and `many` for `vmap`."""
    batched = jax.custom_batching.custom_vmap(native)

    @jax.custom_jvp
    def operation(a: Array, b: Array) -> Array:
        return batched(a, b)

    batched.def_vmap(functools.partial(many, operation))

    @operation.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        a, b = primals
        # Bilinear; written so that the tangent is linear in the tangents and can be transposed.
        return operation(a, b), plain(tangents[0], b) + plain(a, tangents[1])

    return operation


def _threads() -> int:
    """How many threads share a batch: one where there are several host devices, which do that among themselves."""
    return threads() if jax.local_device_count() == 1 else 1


def _batch_axes(argument: Any) -> Any:
    spec = argument.sharding.spec
    return spec[0] if len(spec) else None


def _by_batch(native: Any) -> Any:
    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        rows = NamedSharding(mesh, PartitionSpec(_batch_axes(arguments[0])))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, native, rows, (rows, whole, whole)

    return partition


def _split(native: Any, numbers: tuple[int, ...], rule: str, partition: Any, whole: str) -> Any:
    """`native`, split over devices by the factor "b" of `rule` alone; the others, in the rule's order, stay whole.

    What a convolution is told (its version, the number of threads, and `numbers`) comes as an array: a function that is
    partitioned is not in the program's text but behind a pointer, which JAX's compilation cache has to overlook
    (`mpisjax.training.devices.compilation_cache`), and would then be taken for another one.
    """
    operation = custom_partitioning(native)
    operation.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole))

    def told(a: Array, b: Array) -> Array:
        available()  # XLA must know the targets, also where nobody asked `supports`
        # Of literals: arrays that a program closes over come in another order each time it is traced.
        parts = [lax.broadcast(np.int32(n), (1,)) for n in (fingerprint(), _threads(), *numbers)]
        return operation(a, b, lax.concatenate(parts, 0))

    return told
