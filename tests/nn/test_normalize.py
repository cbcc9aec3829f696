"""Batch normalisation: the formula, its derivatives of both orders and directions, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax.nn.normalize import EPSILON, batch_normalize


def formula(y, scale, bias):
    axes = tuple(range(y.ndim - 1))
    return scale * (y - y.mean(axes)) / jnp.sqrt(y.var(axes) + EPSILON) + bias


def drawn(dtype=jnp.float64, shape=(4, 3, 2, 5)):
    rng = np.random.default_rng(0)
    y = rng.normal(1, 2, shape)
    return [jnp.asarray(a, dtype) for a in (y, rng.normal(1, 1, shape[-1]), rng.normal(size=shape[-1]))]


def losses(weights):
    return (
        lambda *arrays: jnp.sum(jnp.sin(batch_normalize(*arrays)[0]) * weights),
        lambda *arrays: jnp.sum(jnp.sin(formula(*arrays)) * weights),
    )


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.hessian, lambda f, n: jax.jacrev(jax.jacrev(f, n), n)])
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (6, 2)], ids=str)
def test_derivatives_are_those_of_the_formula(x64, transform, shape):
    arrays = drawn(shape=shape)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float64)).reshape(shape)
    ours, exact = (jax.jit(transform(loss, (0, 1, 2)))(*arrays) for loss in losses(weights))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_no_derivative_passes_through_the_statistics(x64):
    arrays = drawn()
    for n in (1, 2):
        gradient = jax.grad(lambda *a: jnp.sum(batch_normalize(*a)[n]), (0, 1, 2))(*arrays)  # noqa: B023
        twice = jax.jvp(jax.grad(lambda *a: jnp.sum(batch_normalize(*a)[n] ** 2), (0, 1, 2)), arrays, arrays)  # noqa: B023
        for value in jax.tree.leaves((gradient, twice)):
            np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_are_wide_and_the_gradient_is_in_the_dtype_of_what_it_belongs_to(dtype):
    y, scale, bias = drawn(jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out, mean, var = batch_normalize(y.astype(dtype), scale, bias)
        found = jax.grad(lambda *a: batch_normalize(*a)[0].astype(jnp.float32).max(), (0, 1, 2))(
            y.astype(dtype), scale, bias
        )
    assert out.dtype == dtype and mean.dtype == var.dtype == jnp.float32
    assert [a.dtype for a in found] == [dtype, jnp.float32, jnp.float32]
    np.testing.assert_allclose(mean, y.mean((0, 1, 2)), rtol=1e-2)
    np.testing.assert_allclose(var, y.var((0, 1, 2)), rtol=1e-2)


def test_backward_has_two_reductions_and_keeps_the_activity_alone():
    arrays = drawn(jnp.float32)
    out, pull = jax.vjp(lambda *a: batch_normalize(*a)[0], *arrays)
    kept = [a for a in jax.tree.leaves(pull) if getattr(a, "shape", None) == out.shape]
    assert len(kept) <= 1
    backward = jax.jit(pull).lower(out).compile().as_text()
    assert backward.count(" reduce(") == 2


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0), (None, 0, None)], ids=str)
def test_vmap(x64, axes):
    arrays = [jnp.stack([a, 2 * a]) if n == 0 else a for a, n in zip(drawn(), axes, strict=True)]
    gradient = jax.grad(losses(1.0)[0], (0, 1, 2))
    found = jax.vmap(gradient, axes)(*arrays)
    for i in range(2):
        one = gradient(*(a[i] if n == 0 else a for a, n in zip(arrays, axes, strict=True)))
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-11, atol=1e-11)
