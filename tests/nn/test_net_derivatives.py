"""A whole MPIS network: Hessian-vector products and forward mode, learned thresholds, neurons by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import mpisjax
from mpisjax.errors import UserError
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS

pytestmark = pytest.mark.unoptimized
NEURON = mpisjax.IF()
SOLVED = mpisjax.RateForward("picard", 300, 1e-13)
ADJOINT = mpisjax.Adjoint("neumann", 300, 1e-13)


def small(**options):
    return MPIS(3, stem=(2,), layers=(3, 4), **options)


def variables_of(net, seed=0, size=6):
    images = jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (2, size, size, 1)))
    variables = model.init_variables(net, jax.random.key(seed), images, NEURON)
    rng = np.random.default_rng(seed)
    # Gains and shifts off their initial values, so that rates lie inside their bounds.
    params = jax.tree.map(lambda a: a + 0.05 * rng.normal(size=a.shape), variables["params"])
    return {**variables, "params": params}, images


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_products_with_the_hessian_are_differences_of_gradients(x64, train):
    net = small()
    variables, images = variables_of(net)
    flat, unravel = ravel_pytree((variables["params"], images))

    def loss(flat):
        params, images = unravel(flat)
        out = model.apply(
            net,
            {**variables, "params": params},
            images,
            neuron=NEURON,
            forward=SOLVED,
            adjoint=ADJOINT,
            train=train,
        )
        return jnp.sum(jax.nn.log_softmax(out.logits)[:, 0]) + 0.1 * jnp.sum(
            out.equilibrium.layer_rates["stream2/layer1"]
        )

    v = jnp.asarray(np.random.default_rng(1).normal(size=flat.size))
    v = v / jnp.linalg.norm(v)
    gradient_and_product = jax.jit(lambda flat: jax.jvp(jax.grad(loss), (flat,), (v,)))
    gradient, forward_over_reverse = gradient_and_product(flat)
    step = 1e-6
    after, before = (gradient_and_product(flat + by * v)[0] for by in (step, -step))
    expected = (after - before) / (2 * step)
    assert jnp.linalg.norm(expected) > 1e-2
    np.testing.assert_allclose(forward_over_reverse, expected, atol=1e-5)
    if train:
        # J has running statistics and the step the batch's: the gradient is no potential's, and this no symmetric
        # matrix.
        return
    reverse_over_reverse = jax.jit(jax.grad(lambda f: jnp.vdot(jax.grad(loss)(f), v)))(flat)
    np.testing.assert_allclose(reverse_over_reverse, forward_over_reverse, atol=1e-8)
    slope = jax.jit(lambda v: jax.jvp(loss, (flat,), (v,))[1])(v)
    assert float(slope) == pytest.approx(float(jnp.vdot(gradient, v)), abs=1e-10)


def test_a_network_with_trained_thresholds_has_one_fixed_point_and_their_gradient(x64):
    net = small(learn_threshold=True, neurons=("graded2", "lif"), neuron=NEURON)
    variables, images = variables_of(net)
    thresholds = [k for k in variables["params"] if k.startswith("log_threshold")]
    assert len(thresholds) == 4

    def rates(params, forward, returns="equivalent"):
        return model.apply(
            net,
            {**variables, "params": params},
            images,
            neuron=NEURON,
            forward=forward,
            adjoint=ADJOINT,
            returns=returns,
        ).equilibrium.rates

    def loss(params):
        return sum(jnp.sum(r**2) for r in jax.tree.leaves(rates(params, SOLVED)))

    found = jax.jit(jax.grad(loss))(variables["params"])
    value = jax.jit(loss)
    for name in thresholds:
        moved = [{**variables["params"], name: variables["params"][name].at[0].add(d)} for d in (1e-6, -1e-6)]
        expected = float(value(moved[0]) - value(moved[1])) / 2e-6
        assert float(found[name][0]) == pytest.approx(expected, abs=1e-5)
    assert any(np.any(found[name]) for name in thresholds)
    settled = jax.jit(lambda p: rates(p, SOLVED))(variables["params"])

    def gap(steps):
        spikes = jax.jit(lambda p: rates(p, mpisjax.SpikeForward(steps), "spikes"))(variables["params"])
        return max(float(jnp.abs(spikes[name] - settled[name]).max()) for name in settled)

    gaps = gap(30), gap(1000)
    assert gaps[1] < 0.02 and gaps[1] < gaps[0] / 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"neurons": ("lif",)}, "1 kinds and model.layers 2"),
        ({"neurons": ("lif", "izhikevich")}, "'izhikevich'"),
    ],
)
def test_impossible_neurons_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        small(**options)
