"""What a user feels: seconds until something happens, until a network is good, and until it answers; peak memory.

Start-up and training run in processes of their own, as a command line does. Peak memory is the process's largest
resident size, everything included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.loader import config_of
from benchmarks.resident import peak_mib
from benchmarks.timing import compiled, measure
from mpisjax import load_pretrained
from mpisjax.configuration.makers import make_evaluation_solver
from mpisjax.nn import model
from mpisjax.pretrained import available
from mpisjax.simulate import SpikeForward

Rows = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[1]
# Fashion-MNIST's network with few solver steps, one cosine over fifteen epochs, and a validation at few time steps.
RECIPE = {
    "forward.max_steps": 3,
    "forward.num_steps": 4,
    "adjoint.max_steps": 1,
    "train.epochs": 15,
    "train.ema": 0.995,
    "train.test_at_end": False,
}
GOALS = (0.90, 0.92, 0.93)  # of the validation split


def _command(*arguments: object, cache: str | None = None) -> tuple[list[str], dict[str, str]]:
    """A command of Python's in the repository, and its environment."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
    return [sys.executable, *map(str, arguments)], environment


def measure_startup() -> Rows:
    """Seconds from the command to the first training step, with empty caches and with warm ones; and of the import.

    Cold, the C++ is compiled, and XLA's programs are; warm, both come from the cache.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what in ("cold", "warm"):
            with tempfile.TemporaryDirectory() as run:
                command, environment = _command(
                    "train.py", f"--workdir={run}/run", "--config.train.log_every=1", cache=folder
                )
                began = time.perf_counter()
                with subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                ) as process:
                    assert process.stdout is not None
                    reached = next(iter(line for line in process.stdout if ", step 1/" in line), None)
                    seconds = time.perf_counter() - began
                    process.kill()
            if reached is None:
                raise RuntimeError("python train.py ended before its first step")
            rows.append({"what": f"python train.py, to its first step, {what}", "seconds": seconds})
        command, environment = _command("-c", "import mpisjax", cache=folder)
        for name in ("jax", "mpisjax"):
            command[-1] = f"import {name}"
            timing = measure(lambda c=command: subprocess.run(c, cwd=ROOT, env=environment, check=True), repeats=5)
            rows.append({"what": f"import {name}", "seconds": timing.seconds})
    return rows


def measure_accuracy(data_dir: str, epochs: int | None = None) -> Rows:
    """Fashion-MNIST from nothing: seconds until each of `GOALS`, with the processor's seconds and the peak of memory.

    Args:
        data_dir: As of the loader section.
        epochs: Instead of the recipe's.
    """
    settings = RECIPE | ({} if epochs is None else {"train.epochs": epochs})
    where = config_of("fashion_mnist", data_dir).data.dir
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command, environment = _command(
            "train.py",
            "--config=configs/fashion_mnist.py",
            f"--config.data.dir={where}",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        )
        reached: dict[float, float] = {}
        peak = 0.0
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            for accuracy in validations(workdir / "metrics.jsonl"):
                reached |= {g: time.perf_counter() - began for g in GOALS if accuracy >= g and g not in reached}
            if ended:
                break
            peak = max(peak, peak_mib(process.pid))
            time.sleep(0.5)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"train.py ended with exit code {process.returncode}")
        best = max(validations(workdir / "metrics.jsonl"))
    return [
        {
            "what": "Fashion-MNIST, 128,346 parameters, from nothing",
            **{f"seconds to {100 * goal:.0f}%": reached.get(goal, "not reached") for goal in GOALS},
            "best validation, %": 100 * best,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_MiB": peak,
        }
    ]


def validations(path: Path) -> list[float]:
    """The accuracies on the validation split that a run has written so far."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row["accuracy"] for row in rows if row["kind"] == "validation"]


def measure_inference(names: Sequence[str] | None = None, *, quick: bool = False, repeats: int = 10) -> Rows:
    """How long an answer takes: one image, and a thousand, by spikes after some time steps and by solved rates.

    Args:
        names: Packaged networks; all by default.
        quick: Fewer points.
        repeats: The most timed calls.
    """
    rows = []
    for name in available() if names is None else names:
        trained = load_pretrained(name)
        temporal = trained.inputs.temporal
        modes: list[int | str] = ["frames"] if temporal else [1, 4, "rates"] if quick else [1, 4, 30, "rates"]
        for mode in modes:
            answer = jax.jit(_answer(trained, mode))
            for batch in (1, 100) if quick else (1, 1000):
                images = jax.random.uniform(jax.random.key(0), (batch, *trained.inputs.shape))
                images = images.swapaxes(0, 1) if temporal else images
                call = compiled(answer, images).call
                timing = measure(lambda c=call, x=images: c(x), repeats=repeats, budget=5.0)
                row = {"network": name, "T or rates": mode, "images": batch, "ms": 1000 * timing.seconds}
                rows.append(row | {"images/s": batch / timing.seconds})
    return rows


def _answer(trained: Any, mode: int | str) -> Any:
    """images -> classes, as one program; the weights are constants of it."""
    variables, neuron = trained.variables, trained.neuron

    def by_rates(images: jax.Array) -> jax.Array:
        solver = make_evaluation_solver(trained.config)
        return jnp.argmax(model.apply(trained.net, variables, images, neuron=neuron, forward=solver).logits, -1)

    def by_spikes(images: jax.Array) -> jax.Array:
        forward = trained.forward if mode == "frames" else SpikeForward(int(mode))
        found = model.spikes(trained.net, variables, images, neuron=neuron, forward=forward)
        return jnp.argmax(model.classify(trained.net, variables, found.rates), -1)

    return by_rates if mode == "rates" else by_spikes
