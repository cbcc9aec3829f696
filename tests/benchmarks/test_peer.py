"""The PyTorch peer and mpisjax compute the same rates and the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpisjax
from benchmarks import nets
from mpisjax import LIF
from mpisjax.nn import model

torch = pytest.importorskip("torch", reason="PyTorch, a benchmark-only extra, is not installed")

from benchmarks import peer_torch  # noqa: E402 (needs torch)

NEURON = LIF(leak=0.95)


@pytest.fixture(scope="module")
def both():
    with jax.enable_x64(True):
        case = nets.case("f64c5", batch_size=3, layers=(6,))
        x = jax.random.normal(jax.random.key(1), (3, 7, 6, 1), jnp.float64)
        variables = model.init_variables(case.net, jax.random.key(0), x, NEURON)
        variables = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        stats = variables["batch_stats"]["inject"]
        stats["mean"] = stats["mean"] + 0.1
        stats["var"] = stats["var"] * 1.3
        peer = peer_torch.F64C5(variables, NEURON.leak, NEURON.initial_potential, torch.float64)
        yield case.net, variables, x, peer, torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_spiking_rates_agree(both, num_steps):
    net, variables, x, peer, x_torch = both
    with jax.enable_x64(True):
        ours = model.spikes(net, variables, x, neuron=NEURON, forward=mpisjax.SpikeForward(num_steps))
        theirs = peer.simulate(x_torch, num_steps).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours.rates["stream1"], theirs, atol=1e-12)
        assert 0.01 < theirs.mean() < 0.9


@pytest.mark.parametrize("solver", [pytest.param("broyden", marks=pytest.mark.slow), "neumann"])
def test_gradients_agree(both, solver):
    net, variables, x, peer, x_torch = both
    labels = np.array([1, 5, 9])
    with jax.enable_x64(True):

        def loss(params):
            out = model.apply(
                net,
                {**variables, "params": params},
                x,
                neuron=NEURON,
                forward=mpisjax.SpikeForward(10),
                adjoint=mpisjax.Adjoint("neumann", max_steps=200, tol=1e-12),
                train=True,
            )
            return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()

        value, ours = jax.value_and_grad(loss)(variables["params"])
        peer.zero_grad()
        mean, var = peer.mean.clone(), peer.var.clone()
        backward = peer_torch.Backward(solver, 100, 1e-11)
        step = peer.backpropagate(x_torch, torch.tensor(labels), peer.simulate(x_torch, 10), backward)
        peer.mean.copy_(mean)
        peer.var.copy_(var)

        assert step.loss == pytest.approx(float(value), rel=1e-10)
        assert 2 < step.num_steps < 100
        inject = peer.inject_kernel.grad.numpy().transpose(2, 3, 1, 0)
        trans = peer.trans_kernel.grad.numpy().transpose(2, 3, 0, 1)[::-1, ::-1]
        np.testing.assert_allclose(ours["inject"]["kernel"], inject, atol=1e-9)
        np.testing.assert_allclose(ours["trans_0"]["kernel"], trans, atol=1e-9)
        np.testing.assert_allclose(ours["trans_0"]["gain"], peer.trans_gain.grad.numpy(), atol=1e-9)
        np.testing.assert_allclose(ours["inject"]["scale"], peer.inject_scale.grad.numpy(), atol=1e-9)
