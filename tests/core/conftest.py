"""The core's tests on a mesh of host devices: `MPISJAX_TEST_MESH=shard_map pytest tests/core`, or `explicit`.

Then `mpisjax.equilibrium_forward` splits its samples over two or four devices: inside `jax.shard_map`, or by the types
of arrays on a mesh with explicit axes. Every test has to hold as it stands.
"""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpisjax
from mpisjax.equilibrium import Equilibrium, equilibrium_forward

MESH = os.environ.get("MPISJAX_TEST_MESH", "")
SPLIT = {"calls": 0}  # how many calls were split: a mesh that is never used tests nothing


def over_samples(tree, axis, size):
    """Which arrays have the samples on an axis, as partition specs."""

    def spec(leaf):
        shape = jnp.shape(leaf)
        has_samples = -len(shape) <= axis < len(shape) and shape[axis] == size
        return P(*[None] * (axis % len(shape)), "d") if has_samples else P()

    return jax.tree.map(spec, tree)


def split(transition, params, x, init, **options):
    """`equilibrium_forward` with its samples on several devices. What has no samples to split runs as it is."""
    axis, probe, time_axis = options.get("batch_axis", 0), options.pop("probe", None), options.get("time_axis")
    leaves = jax.tree.leaves(init)

    def plain():
        return equilibrium_forward(transition, params, x, init, probe=probe, **options)

    whole_probe = probe is not None and probe.residual.ndim == 0  # a sum over the devices is another figure
    coupled = "step" in options  # takes the batch's statistics
    gmres = MESH == "shard_map" and getattr(options.get("adjoint"), "solver", "") == "gmres"  # refused there
    if axis is None or not leaves or not all(-jnp.ndim(a) <= axis < jnp.ndim(a) for a in leaves):
        return plain()
    sizes = {jnp.shape(a)[axis] for a in leaves}
    size = min(sizes)
    devices = next((n for n in (4, 2) if size and size % n == 0), 1)
    if len(sizes) > 1 or devices == 1 or whole_probe or coupled or gmres:
        return plain()
    SPLIT["calls"] += 1
    of_x = over_samples(x, axis if time_axis is None or axis < 0 else axis + 1, size)
    specs = (P(), of_x, over_samples(init, axis, size), P() if probe is None else P("d"))

    if MESH == "explicit":
        params, x, init, probe = jax.sharding.reshard((params, x, init, probe), P())
        x, init = jax.tree.map(jax.sharding.reshard, (x, init), specs[1:3])
        probe = jax.sharding.reshard(probe, P("d")) if probe is not None else None
        return jax.sharding.reshard(equilibrium_forward(transition, params, x, init, probe=probe, **options), P())

    def local(params, x, init, probe):
        found = equilibrium_forward(transition, params, x, init, probe=probe, **options)
        return found._replace(num_steps=jax.lax.pmax(found.num_steps, "d"))

    shapes = jax.eval_shape(lambda *a: equilibrium_forward(transition, *a, **options), params, x, init)
    out = Equilibrium(
        rates=over_samples(shapes.rates, axis, size),
        residual=P("d"),
        num_steps=P(),
        converged=P("d"),
        layer_rates=over_samples(shapes.layer_rates, axis, size),
        aux=P(),
    )
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(params, x, init, probe)


if MESH:
    jax.config.update("jax_num_cpu_devices", 4)
    mpisjax.equilibrium_forward = split

    @pytest.fixture(autouse=True)
    def mesh():
        if MESH == "explicit":
            with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])):
                yield
        else:
            yield

    def pytest_collection_modifyitems(items):
        """What a transition closes over is not split with its samples, and is refused on an explicit mesh."""
        for item in items:
            if "closed_over" in item.name:
                item.add_marker(pytest.mark.skip(reason="closes over a whole batch"))
            if MESH == "explicit" and "equal_central_differences" in item.name:
                reason = "a gradient of jit(f), taken outside jit at arrays on no mesh, has automatic types"
                item.add_marker(pytest.mark.xfail(reason=reason))

    def pytest_terminal_summary(terminalreporter):
        terminalreporter.write_line(f"{SPLIT['calls']} calls of equilibrium_forward had their samples split ({MESH})")
