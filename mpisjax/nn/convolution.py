"""Convolutions that can be differentiated to any order, both ways, and are fast inside loops; upsampling.

There are three maps, each bilinear: the convolution of x and w, its input gradient of g and w, and its kernel
gradient of x and g. They are one family. The derivative of each is the same map of tangents, and its
transposes are the other two. So each is a primitive with its own fast forms, and JAX composes them.

The input gradient convolves with the flipped kernel. Inside a loop XLA:CPU folds that flip into the
convolution, a form that its fast path rejects (measured: 40 times slower). So the flip is made explicitly and
held behind an optimisation barrier. The kernel gradient's transpositions are held back in the same way
(measured: 75 times slower without). On accelerators the barrier copies the kernel and does nothing else.

The flipped kernel, and other kernels that a CPU wants prepared, are operands: they are made outside the
primitive, and `mpisjax.hoisting` moves them out of a loop in which the kernel is constant. They carry no
derivative. The kernel itself is an operand too, and carries it.

A CPU has forms of its own (`mpisjax.cpu.forms`). The form is chosen when a program is lowered for a platform,
so that an export for several platforms holds the right one for each.

Layouts are NHWC for activity and HWIO for kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from mpisjax import cpu
from mpisjax.cpu import forms
from mpisjax.cpu.cores import jax_setting

Array = jax.Array
Pair = tuple[int, int]
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Array, w: Array, stride: int = 1) -> Array:
    """2-D convolution (cross-correlation) with "same" padding.

    Args:
      x: [batch, height, width, in].
      w: [kernel, kernel, in, out], same dtype as `x`.
      stride: 1 or 2.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), out].
    """
    return _convolve(x, w, stride)


def conv_transpose2d(x: Array, w: Array, stride: int, size: Pair) -> Array:
    """Transposed convolution: the transpose of `conv2d(., w, stride)` on inputs of spatial `size`.

    The output is tied to a size and not to a multiple, so that odd sizes come out right: 4 -> 7 as well as 4
    -> 8.

    Args:
      x: [batch, ceil(height / stride), ceil(width / stride), in].
      w: [kernel, kernel, out, in]: the kernel of the convolution that this is the transpose of.
      stride: that convolution's stride.
      size: (height, width) of the output.

    Returns:
      [batch, height, width, out].
    """
    return _input_gradient(x, w, stride, size)


def halved(size: int, times: int = 1) -> int:
    """A spatial size after `times` stride-2 convolutions with "same" padding: 28, 14, 7, 4, 2, 1."""
    return -(-size // 2**times)


def upsample(x: Array, factor: int, size: Pair) -> Array:
    """Nearest-neighbour upsampling by `factor`, cropped to `size`.

    Broadcast and reshape, whose transpose is a sum; `jnp.repeat` would differentiate into a scatter.

    Args:
      x: [batch, h, w, channels].
      factor: whole number, >= 1.
      size: (height, width), at most `factor` times x's.
    """
    b, h, w, c = x.shape
    big = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, factor, w, factor, c))
    return big.reshape(b, h * factor, w * factor, c)[:, : size[0], : size[1]]


# The three maps. With `mapped`, all operands have one more leading axis, over which the map is mapped.


def _convolve(x: Array, w: Array, stride: int, mapped: bool = False) -> Array:
    x, w = _varying_alike(x, w)
    prepare = _each(functools.partial(forms.prepare, _one_of(x), stride=stride), mapped)
    return _bind(_conv_p, x, w, *prepare(w), mapped=mapped, stride=stride)


def _input_gradient(g: Array, w: Array, stride: int, size: Pair, mapped: bool = False) -> Array:
    """d<g, conv(x, w)>/dx for an x of spatial `size`: the transposed convolution."""
    g, w = _varying_alike(g, w)
    flipped = lax.optimization_barrier(lax.rev(w, (w.ndim - 4, w.ndim - 3)).swapaxes(-2, -1))
    geometry: dict[str, Any] = {"stride": stride, "size": tuple(size)}
    low = _before(size, w.shape[-4:-2], stride)
    prepare = functools.partial(forms.prepare_transposed, _one_of(g), low=low, **geometry)
    return _bind(_input_p, g, w, flipped, *_each(prepare, mapped)(flipped), mapped=mapped, **geometry)


def _kernel_gradient(x: Array, g: Array, stride: int, kernel: Pair, mapped: bool = False) -> Array:
    """d<g, conv(x, w)>/dw for a w of spatial size `kernel`."""
    x, g = _varying_alike(x, g)
    return _bind(_kernel_p, x, g, mapped=mapped, stride=stride, kernel=tuple(kernel))


def _one_of(x: Array) -> jax.ShapeDtypeStruct:
    """The shape of x without an axis that is mapped over."""
    return jax.ShapeDtypeStruct(x.shape[-4:], x.dtype)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Under `jax.shard_map` all operands of a primitive vary over the same axes. The transpose is a sum."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    every = frozenset[Any]().union(*varying)
    return [
        lax.pcast(a, tuple(sorted(every - own)), to="varying") if every - own else a
        for a, own in zip(arrays, varying, strict=True)
    ]


def _each(fn: Callable[..., Any], mapped: bool) -> Callable[..., Any]:
    return jax.vmap(fn) if mapped else fn


# What the primitives compute: by XLA's plain operations, and on a CPU.


def same_padding(size: int, kernel: int, stride: int) -> Pair:
    """The zeros that "same" padding puts before the first pixel and after the last one."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _before(size: Sequence[int], kernel: Sequence[int], stride: int) -> Pair:
    """Rows and columns of padding before an image of spatial `size`."""
    return same_padding(size[0], kernel[0], stride)[0], same_padding(size[1], kernel[1], stride)[0]


def _conv_plain(x: Array, w: Array, *prepared: Array, stride: int) -> Array:
    del prepared
    padding = [same_padding(n, k, stride) for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _conv_on_cpu(x: Array, w: Array, *prepared: Array, stride: int) -> Array | None:
    return forms.convolve(x, w, prepared, stride, _before(x.shape[1:3], w.shape, stride))


def _input_plain(g: Array, w: Array, flipped: Array, *prepared: Array, stride: int, size: Pair) -> Array:
    del w, prepared
    padding = []
    for n, m, k in zip(size, g.shape[1:3], flipped.shape[:2], strict=True):
        low = k - 1 - same_padding(n, k, stride)[0]
        padding.append((low, n + k - 1 - ((m - 1) * stride + 1) - low))
    return lax.conv_general_dilated(
        g, flipped, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _input_on_cpu(g: Array, w: Array, flipped: Array, *prepared: Array, stride: int, size: Pair) -> Array | None:
    del w
    return forms.transposed(g, flipped, prepared, stride, size, _before(size, flipped.shape, stride))


def _kernel_plain(x: Array, g: Array, *, stride: int, kernel: Pair) -> Array:
    zeros = jnp.zeros((*kernel, x.shape[3], g.shape[3]), x.dtype)
    w = _varying_alike(x, zeros)[1]
    return jax.linear_transpose(lambda w: _conv_plain(x, w, stride=stride), w)(g)[0]


def _kernel_on_cpu(x: Array, g: Array, *, stride: int, kernel: Pair) -> Array:
    return forms.kernel_gradient(x, g, kernel, stride, _before(x.shape[1:3], kernel, stride))


# The primitives. Their parameters hold the program of each form, as the parameters of JAX's own primitives of
# functions do. JAX looks in there for operations that need devices when they are lowered, and whoever counts
# a program's operations finds the plain form.


class _Forms(NamedTuple):
    """A map as XLA's plain operations, and as a CPU has it: None where that is the same."""

    plain: Callable[..., Array]
    on_cpu: Callable[..., Array | None]


def _primitive(name: str, forms: _Forms) -> Primitive:
    """A primitive; its rules for derivatives and `vmap` follow below."""
    primitive = Primitive(name)

    def type_of(*avals: Any, mapped: bool, precision: Any, plain: Any, on_cpu: Any, **params: Any) -> Any:
        del precision, plain, on_cpu
        form = _each(functools.partial(forms.plain, **params), mapped)
        return jax.make_jaxpr(form)(*avals).out_avals[0]

    def eagerly(*operands: Array, **params: Any) -> Array:
        with jax.disable_jit(False):
            return _jitted(primitive, tuple(params.items()))(*operands)

    _FORMS[primitive] = forms
    primitive.def_impl(eagerly)
    primitive.def_abstract_eval(type_of)
    mlir.register_lowering(primitive, _lower_plain)
    mlir.register_lowering(primitive, _lower_on_cpu, platform="cpu")
    return primitive


_FORMS: dict[Primitive, _Forms] = {}


@functools.lru_cache(4096)
def _jitted(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


def _bind(primitive: Primitive, *operands: Array, mapped: bool, **params: Any) -> Array:
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands)
    precision = jax_setting("jax_default_matmul_precision")
    settled = cpu.enabled(), precision
    plain, on_cpu = _programs(primitive, mapped, tuple(params.items()), shapes, settled)
    return primitive.bind(*operands, mapped=mapped, precision=precision, plain=plain, on_cpu=on_cpu, **params)


@functools.lru_cache(4096)
def _programs(
    primitive: Primitive,
    mapped: bool,
    params: tuple[tuple[str, Any], ...],
    shapes: tuple[Any, ...],
    settled: Any,
) -> tuple[ClosedJaxpr, ClosedJaxpr | None]:
    """The programs of both forms. A mesh has its say in the types of a primitive, not in there."""
    del settled  # whatever else they depend on
    plain, on_cpu = (functools.partial(form, **dict(params)) for form in _FORMS[primitive])
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        each = [jax.ShapeDtypeStruct(s.shape[mapped:], s.dtype) for s in shapes]
        for_cpu = jax.make_jaxpr(on_cpu)(*each)
        special = bool(for_cpu.out_avals)
        if not mapped:
            return jax.make_jaxpr(plain)(*shapes), for_cpu if special else None
        one = jaxpr_as_fun(for_cpu if special else jax.make_jaxpr(plain)(*each))
        # One after another: XLA:CPU is slow at convolutions in groups.
        in_turn = jax.make_jaxpr(lambda *operands: lax.map(lambda each: one(*each)[0], operands))(*shapes)
        return jax.make_jaxpr(jax.vmap(plain))(*shapes), in_turn


def _lower_plain(ctx: mlir.LoweringRuleContext, *operands: Any, plain: ClosedJaxpr, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(plain))(ctx.replace(avals_in=plain.in_avals), *operands)


def _lower_on_cpu(
    ctx: mlir.LoweringRuleContext, *operands: Any, plain: ClosedJaxpr, on_cpu: ClosedJaxpr | None, **_: Any
) -> Any:
    return _lower_plain(ctx, *operands, plain=on_cpu or plain)


_conv_p = _primitive("convolution", _Forms(_conv_plain, _conv_on_cpu))
_input_p = _primitive("convolution_input_gradient", _Forms(_input_plain, _input_on_cpu))
_kernel_p = _primitive("convolution_kernel_gradient", _Forms(_kernel_plain, _kernel_on_cpu))


# Derivatives. A primitive's first two operands carry them; kernels that were prepared go along with the
# second.


def _define_derivatives(
    primitive: Primitive,
    remade: Callable[..., Array],
    transpose_a: Callable[..., Array],
    transpose_b: Callable[..., Array],
) -> None:
    """Registers the product rule and both transposes.

    Args:
      primitive: of operands (a, b, *prepared from b).
      remade: `(a, b, params)` to the same map, with the kernels that it needs prepared from this b.
      transpose_a: `(ct, b, a's shape, params)` to the cotangent of a.
      transpose_b: `(ct, a, b's shape, params)` to the cotangent of b.
    """

    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Array]:
        (a, b, *prepared), (da, db, *_) = primals, tangents
        parts = []
        if type(da) is not ad.Zero:
            parts.append(primitive.bind(da, b, *prepared, **params))
        if type(db) is not ad.Zero:
            with jax.default_matmul_precision(params["precision"]):
                parts.append(remade(a, db, params))
        y = primitive.bind(*primals, **params)
        return y, functools.reduce(lax.add, parts) if parts else jnp.zeros_like(y)

    def transpose(ct: Any, a: Any, b: Any, *prepared: Any, **params: Any) -> list[Any]:
        nothing = [None] * len(prepared)
        if type(ct) is ad.Zero:
            return [None, None, *nothing]
        with jax.default_matmul_precision(params["precision"]):
            if ad.is_undefined_primal(a):
                return [transpose_a(ct, b, a.aval.shape, params), None, *nothing]
            return [None, transpose_b(ct, a, b.aval.shape, params), *nothing]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def _conv_of(x: Array, w: Array, p: dict[str, Any]) -> Array:
    return _convolve(x, w, p["stride"], p["mapped"])


def _input_of(g: Array, w: Array, p: dict[str, Any], size: Pair | None = None) -> Array:
    return _input_gradient(g, w, p["stride"], size or p["size"], p["mapped"])


def _kernel_of(x: Array, g: Array, p: dict[str, Any], kernel: Pair | None = None) -> Array:
    return _kernel_gradient(x, g, p["stride"], kernel or p["kernel"], p["mapped"])


_define_derivatives(
    _conv_p,
    _conv_of,
    lambda ct, w, x, p: _input_of(ct, w, p, x[-3:-1]),
    lambda ct, x, w, p: _kernel_of(x, ct, p, w[-4:-2]),
)
_define_derivatives(
    _input_p,
    _input_of,
    lambda ct, w, g, p: _conv_of(ct, w, p),
    lambda ct, g, w, p: _kernel_of(ct, g, p, w[-4:-2]),
)
_define_derivatives(
    _kernel_p,
    _kernel_of,
    lambda ct, g, x, p: _input_of(g, ct, p, x[-3:-1]),
    lambda ct, x, g, p: _conv_of(x, ct, p),
)


# `vmap`. An operand that alone is mapped has its new axis folded into one that only it and the result have.


def _define_vmap(
    primitive: Primitive, remade: Callable[..., Array], axes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Registers the rule for `vmap`.

    Args:
      primitive: of operands (a, b, *prepared from b).
      remade: as in `_define_derivatives`.
      axes: (the operand's, the result's) axis that the new one is folded into, for a and for b.
    """

    def rule(
        operands: Sequence[Any],
        dims: Sequence[Any],
        *,
        mapped: bool,
        precision: Any,
        plain: Any,
        on_cpu: Any,
        **params: Any,
    ) -> tuple[Array, int]:
        del plain, on_cpu  # of other shapes
        with jax.default_matmul_precision(precision):
            return batch(operands, dims, mapped, params)

    def batch(operands: Sequence[Any], dims: Sequence[Any], mapped: bool, params: dict[str, Any]) -> tuple[Array, int]:
        count = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
        of_a, of_b = dims[0] is not None, any(d is not None for d in dims[1:])
        if mapped or (of_a and of_b):
            whole = [
                jnp.moveaxis(a, d, 0) if d is not None else jnp.broadcast_to(a, (count, *a.shape))
                for a, d in zip(operands, dims, strict=True)
            ]
            if not mapped:
                return _bind(primitive, *whole, mapped=True, **params), 0
            y = _bind(primitive, *(a.reshape(-1, *a.shape[2:]) for a in whole), mapped=True, **params)
            return y.reshape(count, -1, *y.shape[1:]), 0
        place = 0 if of_a else 1
        axis, result = axes[place]
        moved = jnp.moveaxis(operands[place], dims[place], axis)
        folded = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
        if of_a:
            y = _bind(primitive, folded, *operands[1:], mapped=False, **params)
        else:
            y = remade(operands[0], folded, params | {"mapped": False})
        return y.reshape(*y.shape[:result], count, -1, *y.shape[result + 1 :]), result

    batching.primitive_batchers[primitive] = rule


_define_vmap(_conv_p, _conv_of, ((0, 0), (3, 3)))
_define_vmap(_input_p, _input_of, ((0, 0), (2, 3)))
_define_vmap(_kernel_p, _kernel_of, ((3, 2), (3, 3)))
