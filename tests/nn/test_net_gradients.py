"""The network's gradients in float64: dense solves, central differences, batch norm, dropout, training mode."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_nets import random_images, random_variables

import mpisjax
from mpisjax import Adjoint, RateForward, nn
from mpisjax.firing import RateReading
from mpisjax.nn import mpis

pytestmark = pytest.mark.unoptimized

NEURON = mpisjax.IF(threshold=0.9)
SOLVED = RateForward("picard", 300, 1e-15)
SOLVERS = {
    "neumann": Adjoint("neumann", 300, 1e-13),
    "anderson": Adjoint("anderson", 300, 1e-13),
    "gmres": Adjoint("gmres", 300, 1e-13, history=30),
    "bicgstab": Adjoint("bicgstab", 300, 1e-13),
    "normal_cg": Adjoint("normal_cg", 600, 1e-13),
}
# Two streams on an odd size, dropout; three streams with the other head; frames over time.
NETS = {
    "two streams, dropout": {"num_streams": 2, "dropout": 0.3},
    "three streams": {"num_streams": 3, "fusion_layer": 1, "head": "smallest"},
    "frames": {"num_streams": 2, "temporal": True},
}
SEEDS = {"two streams, dropout": 3, "three streams": 1, "frames": 2}


@functools.cache
def problem(name):
    """(net, variables with dropout masks, images, weights of the logits)."""
    net = nn.MPIS(num_classes=3, stem=(2,), layers=(3, 4), **NETS[name])
    images = random_images(SEEDS[name], *((3,) if net.temporal else ()), 2, 5, 5, 2)
    variables = random_variables(net, images, SEEDS[name], gain=0.5 if net.dropout else 1.2)
    variables["masks"] = nn.sample_masks(net, jax.random.key(5), 2)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(variables))
    if net.dropout:
        kept = ravel_pytree(variables["masks"])[0]
        assert 0.4 < (kept > 0).mean() < 0.95
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    return net, variables, images, weights


def encoded(net, variables, images):
    x = net.apply(variables, images, False, method="encode")
    return x.mean(0) if net.temporal else x


def rate_map(net, variables, images, rates):
    x = encoded(net, variables, images)
    return net.apply(variables, rates, x, RateReading(NEURON), False, method="transition")


def settle(net, variables, images):
    return jax.lax.fori_loop(0, 120, lambda _, r: rate_map(net, variables, images, r), net.initial_rates(images))


def objective(logits, weights):
    return jnp.sum(weights * logits + 0.1 * logits**2)


def readout(net, variables, rates, weights):
    return objective(net.apply(variables, rates, False, method="classify"), weights)


@functools.cache
def reference(name):
    """(equilibrium, gradient of the whole by a dense solve in variables and images)."""
    net, variables, images, weights = problem(name)

    @jax.jit
    def run(variables, images):
        rates = settle(net, variables, images)
        flat, unravel = ravel_pytree(rates)
        J = jax.jacrev(lambda r: ravel_pytree(rate_map(net, variables, images, unravel(r)))[0])(flat)
        direct, g = jax.grad(lambda v, r: readout(net, v, r, weights), argnums=(0, 1))(variables, rates)
        v = unravel(jnp.linalg.solve(jnp.eye(flat.size) - J.T, ravel_pytree(g)[0]))
        through, dx = jax.vjp(lambda p, x: rate_map(net, p, x, rates), variables, images)[1](v)
        return rates, (jax.tree.map(jnp.add, direct, through), dx), J

    rates, gradient, J = run(variables, images)
    radius = np.abs(np.linalg.eigvals(J)).max()
    assert 0.1 < radius < 0.85, f"spectral radius {radius:.2f}: the solve is trivial or impossible"
    return rates, gradient


def assert_leaves_close(found, expected, tolerance):
    """Each leaf by its own size; leaves that vanish (a shift before batch statistics) by the whole's."""
    compared, floor = 0, 1e-6 * np.linalg.norm(ravel_pytree(expected)[0])
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= tolerance * max(size, floor), f"{jax.tree_util.keystr(path)}: {error:.1e} of {size:.1e}"
        compared += size > floor
    assert compared >= 10, "most gradients vanish: nothing is tested"


@pytest.mark.parametrize(
    ("name", "solver"),
    [("two streams, dropout", s) for s in SOLVERS] + [("three streams", "neumann"), ("frames", "neumann")],
)
def test_gradients_equal_a_dense_solve(x64, name, solver):
    net, variables, images, weights = problem(name)

    @jax.jit
    def run(variables, images):
        def loss(variables, images):
            out = nn.apply(net, variables, images, neuron=NEURON, forward=SOLVED, adjoint=SOLVERS[solver])
            return objective(out.logits, weights), out.equilibrium

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, images)

    found, equilibrium = run(variables, images)
    rates, expected = reference(name)
    for k, r in rates.items():
        np.testing.assert_allclose(equilibrium.rates[k], r, atol=1e-13)
    assert_leaves_close(found, expected, 1e-8)


def currents_of(name, monkeypatch):
    """Every current that passes a DBReLU anywhere: stem, streams, head. In thresholds."""
    net, variables, images, weights = problem(name)
    rates, _ = reference(name)

    @jax.jit
    def run(variables, images, rates):
        seen = []

        class Fire(RateReading):
            def __call__(self, name, current):
                seen.append(current / self.neuron.threshold)
                return super().__call__(name, current)

        def recording(u):
            seen.append(u)
            return jnp.clip(u, 0, 1)

        monkeypatch.setattr(mpis, "dbrelu", recording)
        nn.transition_of(net)(variables, rates, encoded(net, variables, images), Fire(NEURON))
        readout(net, variables, rates, weights)
        monkeypatch.undo()
        return seen

    return np.concatenate([np.ravel(u) for u in run(variables, images, rates)])


@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_central_differences_of_the_solved_equilibrium(x64, name, monkeypatch):
    """By leaf, along two random directions: for every parameter, running statistic, and the input."""
    currents = currents_of(name, monkeypatch)
    currents = currents[currents != 0]  # dropped channels: no parameter moves them
    assert np.minimum(np.abs(currents), np.abs(currents - 1)).min() > 1e-4, "at a kink: another seed"
    net, variables, images, weights = problem(name)
    _, (slopes, slopes_in_images) = reference(name)
    moved = {k: v for k, v in variables.items() if k != "masks"}

    @jax.jit
    def loss(flat):
        moved, images = unravel(flat)
        variables_moved = {**variables, **moved}
        return readout(net, variables_moved, settle(net, variables_moved, images), weights)

    flat, unravel = ravel_pytree((moved, images))
    slopes, _ = ravel_pytree(({k: slopes[k] for k in moved}, slopes_in_images))
    # Which leaf an entry of the flat vector belongs to.
    sizes = [leaf.size for leaf in jax.tree.leaves(unravel(flat))]
    ends = np.cumsum(sizes)
    rng, step = np.random.default_rng(0), 1e-5
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(unravel(flat))]
    for path, size, end in zip(paths, sizes, ends, strict=True):
        for _ in range(2):
            direction = np.zeros(flat.size)
            direction[end - size : end] = rng.normal(size=size)
            direction /= np.linalg.norm(direction)
            difference = (loss(flat + step * direction) - loss(flat - step * direction)) / (2 * step)
            scale = max(np.linalg.norm(slopes[end - size : end]), 1e-4)
            assert abs(difference - slopes @ direction) <= 1e-6 * scale, path


@pytest.mark.parametrize("name", ["two streams, dropout", "frames"])
def test_training_takes_batch_statistics_in_the_one_step_and_running_ones_in_the_solve(x64, name):
    """dL/dtheta = (df_batch/dtheta)^T v, (I - J^T) v = g with J from running statistics; f_batch at r_T."""
    net, variables, images, weights = problem(name)
    key = jax.random.key(11)
    given = {k: variables[k] for k in ("params", "batch_stats")}
    masks = nn.sample_masks(net, key, 2)

    @jax.jit
    def run(params):
        def loss(params):
            out = nn.apply(
                net,
                {**given, "params": params},
                images,
                neuron=NEURON,
                forward=SOLVED,
                adjoint=SOLVERS["neumann"],
                train=True,
                rng=key,
            )
            return objective(out.logits, weights), out

        return jax.grad(loss, has_aux=True)(params)

    found, out = run(given["params"])

    def by_batch(params, stats, *args, method):
        out, updated = net.apply(
            {"params": params, "batch_stats": stats, "masks": masks},
            *args,
            True,
            method=method,
            mutable=["batch_stats"],
        )
        return out, updated["batch_stats"]

    @jax.jit
    def reference(params):
        def one_step(params, rates):
            x, stats = by_batch(params, given["batch_stats"], images, method="encode")
            x = x.mean(0) if net.temporal else x
            return by_batch(params, stats, rates, x, RateReading(NEURON), method="transition")

        def solved_map(rates):
            x, stats = by_batch(params, given["batch_stats"], images, method="encode")
            x = x.mean(0) if net.temporal else x
            frozen = {"params": params, "batch_stats": stats, "masks": masks}
            return net.apply(frozen, rates, x, RateReading(NEURON), False, method="transition")

        found = jax.lax.fori_loop(0, 120, lambda _, r: solved_map(r), net.initial_rates(images))
        (rates, stats), pull = jax.vjp(lambda p: one_step(p, found), params)

        def head(params, rates):
            logits, last = by_batch(params, stats, rates, method="classify")
            return objective(logits, weights), last

        (direct, g), last = jax.grad(head, argnums=(0, 1), has_aux=True)(params, rates)
        flat, unravel = ravel_pytree(rates)
        J = jax.jacrev(lambda r: ravel_pytree(solved_map(unravel(r)))[0])(flat)
        v = unravel(jnp.linalg.solve(jnp.eye(flat.size) - J.T, ravel_pytree(g)[0]))
        (through,) = pull((v, jax.tree.map(jnp.zeros_like, stats)))
        return jax.tree.map(jnp.add, direct, through), rates, last

    expected, rates, stats = reference(given["params"])
    for k, r in rates.items():
        np.testing.assert_allclose(out.equilibrium.rates[k], r, atol=1e-12)
    assert_leaves_close(found, expected, 1e-8)
    # Each running statistic moved once: kept 0.9 of itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), out.batch_stats, stats)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), out.batch_stats, given["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_batch_normalisation_is_flaxs():
    """Values, updated statistics and their once-a-call update against `flax.linen.BatchNorm`."""
    from mpisjax.nn.layers import ConvNorm

    images = random_images(0, 3, 6, 6, 2)
    layer = ConvNorm(4, momentum=0.8)
    variables = layer.init(jax.random.key(0), images, True)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.3, 1.2, a.shape), a.dtype), variables)
    p, stats = variables["params"], variables["batch_stats"]
    kernel = p["gain"] * p["kernel"] / np.sqrt(np.sum(np.square(p["kernel"]), axis=(0, 1, 2)))
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    theirs = flax.linen.BatchNorm(momentum=0.8, epsilon=1e-5)
    for batch_statistics in (False, True):
        expected, updated = theirs.apply(
            {"params": {"scale": p["scale"], "bias": p["bias"]}, "batch_stats": stats},
            y,
            use_running_average=not batch_statistics,
            mutable=["batch_stats"],
        )
        found, ours = layer.apply(variables, images, batch_statistics, mutable=["batch_stats"])
        np.testing.assert_allclose(found, expected, atol=2e-5)
        for k in ("mean", "var"):
            np.testing.assert_allclose(ours["batch_stats"][k], updated["batch_stats"][k], atol=1e-5)
