"""Ours beside the PyTorch peer, on the same F64C5 network, weights, images and cores, in one run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.nets import Subject, case
from benchmarks.timing import measure
from mpisjax.configuration import makers
from mpisjax.data import prepare_images
from mpisjax.nn import model
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import RateForward

# The peer's backward: IDE-FSNN's setting; Broyden stopped where ours stops; the same solver and tolerance as
# ours.
BACKWARDS = {
    "Broyden as IDE-FSNN": ("broyden", 30, 0.0),
    "Broyden, our tolerance": ("broyden", 30, 1e-2),
    "Neumann, our tolerance": ("neumann", 12, 1e-2),
}


def agreement(num_steps: Iterable[int], samples: int = 8) -> list[dict[str, Any]]:
    """The largest difference between both sides' firing rates, with the same weights, in float64.

    Spiking is a threshold: in float32 a potential that sits on it to the last bit may fire on one side and
    not on the other, and feedback carries that on, so that equality is a question for float64.

    Args:
        num_steps: Of the simulations compared; the rate solution is compared too.
        samples: Images.
    """
    import torch

    from benchmarks import peer_torch

    subject = Subject(case("f64c5"), warmup=3)
    variables = jax.tree.map(lambda a: np.asarray(a, np.float64), subject.variables())
    images = np.asarray(subject.batch.images)[:samples]
    neuron = makers.make_neuron(subject.case.config)
    found = []
    with jax.enable_x64(True):
        x: Any = np.asarray(prepare_images(jnp.asarray(images), subject.case.dataset), np.float64)
        peer = peer_torch.F64C5(variables, neuron.leak, neuron.initial_potential, torch.float64)
        theirs_x = torch.tensor(x).permute(0, 3, 1, 2)
        modes: list[int | str] = [*num_steps, "rates"]
        for steps in modes:
            if isinstance(steps, str):
                forward = RateForward("picard", max_steps=30, tol=0.0)
                ours = model.apply(
                    subject.case.net, variables, x, neuron=neuron, forward=forward, returns="spikes"
                ).equilibrium.rates["stream1"]
                theirs = peer.solve(theirs_x, 30)
            else:
                spikes = model.spikes(subject.case.net, variables, x, neuron=neuron, forward=SpikeForward(steps))
                ours, theirs = spikes.rates["stream1"], peer.simulate(theirs_x, steps)
            difference = np.abs(np.asarray(ours) - theirs.permute(0, 2, 3, 1).numpy()).max()
            found.append({"mode": steps, "largest difference": float(difference), "mean rate": float(theirs.mean())})
    return found


def compare(num_steps: Iterable[int], repeats: int, others: int) -> list[dict[str, Any]]:
    """Whole training steps, ours and the peer's, on the GPU where JAX computes on one.

    Args:
        num_steps: Of the spiking forward.
        repeats: Timed steps, of ours and of the peer with IDE-FSNN's backward.
        others: Timed steps of the peer with the other backwards.
    """
    import torch

    from benchmarks import peer_torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does by default, and PyTorch's own convolutions
    subject = Subject(case("f64c5"))
    config, neuron = subject.case.config, makers.make_neuron(subject.case.config)
    variables = jax.tree.map(np.asarray, subject.variables())
    x = np.array(prepare_images(subject.batch.images, subject.case.dataset))
    channels_last = torch.channels_last
    theirs_x = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=channels_last).to(device)
    labels = torch.tensor(np.asarray(subject.batch.labels)).long().to(device)

    def ours(mode: int | str) -> dict[str, Any]:
        step = subject.train_step(mode)
        timing = measure(step, subject.step_arguments, repeats=repeats)
        _, metrics = step(*subject.step_arguments())
        return {
            "who": "mpisjax",
            "forward": mode,
            "backward": "neumann",
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu,
            "repeats": timing.repeats,
            "adjoint_steps": int(metrics.adjoint_steps),
            "loss": float(metrics.loss),
        }

    def theirs(mode: int | str, title: str, repeats: int) -> dict[str, Any]:
        last: list[Any] = []

        def fresh() -> tuple[Any, Any]:
            net = peer_torch.F64C5(variables, neuron.leak, neuron.initial_potential).to(device)
            t = config.train
            return net, peer_torch.optimizer(net, t.learning_rate, t.momentum, t.weight_decay)

        def step(net: Any, optimizer: Any) -> None:
            rates = net.simulate(theirs_x, int(mode))
            backward = peer_torch.Backward(*BACKWARDS[title])
            last[:] = [net.backpropagate(theirs_x, labels, rates, backward)]
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        timing = measure(step, fresh, repeats=repeats)
        return {
            "who": "PyTorch",
            "forward": mode,
            "backward": title,
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu,
            "repeats": timing.repeats,
            "adjoint_steps": last[0].num_steps,
            "loss": last[0].loss,
        }

    num_steps = tuple(num_steps)
    rows = [ours("rates")]
    for n, mode in enumerate(num_steps):
        rows.append(ours(mode))
        rows.append(theirs(mode, "Broyden as IDE-FSNN", repeats))
        if n == 0:
            rows += [theirs(mode, title, others) for title in list(BACKWARDS)[1:]]
    return rows
