"""A task small enough to be run and killed dozens of times in a test: a linear classifier on points in a
plane.

It obeys the contract of the real training step (a NamedTuple state with `step`, `batch_stats`, momentum and
random numbers in it, metrics with `finite` and `skipped`), so that the loop cannot tell the difference. As a
program it runs until its last epoch: `python tests/training/tiny.py --workdir DIR [--slow SECONDS]
[--config.train.epochs=3]`.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

NUM_EXAMPLES, NUM_CLASSES, BATCH_SIZE = 96, 3, 16


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "name": "tiny",
            "seed": 0,
            "data": {"dir": "", "shape": (2,)},
            "train": {
                "epochs": 4,
                "batch_size": BATCH_SIZE,
                "learning_rate": 0.1,
                "log_every": 4,
                "checkpoint_every": 0,
                "checkpoint_seconds": 0.0,
                "keep_checkpoints": 2,
                "max_skipped": 5,
            },
        }
    )


class State(NamedTuple):
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    rng: Any
    skipped: Any


class Metrics(NamedTuple):
    loss: Any
    accuracy: Any
    learning_rate: Any
    grad_norm: Any
    forward_steps: Any
    forward_residual: Any
    forward_converged: Any
    finite: Any
    skipped: Any


class Evaluation(NamedTuple):
    accuracy: float
    loss: float
    residual: dict[str, float]


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(NUM_CLASSES, size=NUM_EXAMPLES)
    centres = np.array([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]])
    points = centres[labels] + generator.normal(size=(NUM_EXAMPLES, 2))
    return points.astype(np.float32), labels.astype(np.int32)


class Feed:
    """Batches from the step alone; a chosen step may be poisoned, and every step slowed down."""

    def __init__(self, poisoned: frozenset[int] = frozenset(), slow: float = 0.0) -> None:
        self.points, self.labels = data()
        self.poisoned, self.slow = poisoned, slow
        self.asked: list[int] = []
        self.steps_per_epoch = NUM_EXAMPLES // BATCH_SIZE

    def batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        self.asked.append(step)
        time.sleep(self.slow)
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((7, epoch)).permutation(NUM_EXAMPLES)
        chosen = order[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
        points = self.points[chosen] * (np.nan if step in self.poisoned else 1.0)
        return jnp.asarray(points, jnp.float32), jnp.asarray(self.labels[chosen])


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


def init_state(config: Any) -> State:
    params = {"kernel": jnp.zeros((2, NUM_CLASSES)), "bias": jnp.zeros(NUM_CLASSES)}
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"mean": jnp.zeros(2)},
        opt_state=optimizer(config.train.learning_rate).init(params),
        ema=(),
        rng=jax.random.key(config.seed),
        skipped=jnp.zeros((), jnp.int32),
    )


def _loss(params: Any, points: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = points @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def make_train_step(config: Any, converged: bool = True) -> Any:
    return _make_train_step(config.train.learning_rate, converged)


@functools.cache  # compiling takes longer than a whole run
def _make_train_step(learning_rate: float, converged: bool) -> Any:
    tx = optimizer(learning_rate)

    @jax.jit
    def train_step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, Metrics]:
        points, labels = batch
        noisy = points + 0.1 * jax.random.normal(jax.random.fold_in(state.rng, state.step), points.shape)
        (loss, logits), grads = jax.value_and_grad(_loss, has_aux=True)(state.params, noisy, labels)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        stats = {"mean": 0.9 * state.batch_stats["mean"] + 0.1 * points.mean(0)}
        new = (optax.apply_updates(state.params, updates), opt_state, stats)
        old = (state.params, state.opt_state, state.batch_stats)
        params, opt_state, stats = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = Metrics(
            loss=loss,
            accuracy=(logits.argmax(-1) == labels).mean(),
            learning_rate=jnp.float32(learning_rate),
            grad_norm=norm,
            forward_steps=jnp.int32(3),
            forward_residual=jnp.float32(0.25),
            forward_converged=jnp.float32(converged),
            finite=finite.astype(jnp.float32),
            skipped=skipped,
        )
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state, batch_stats=stats)
        return state._replace(skipped=skipped), metrics

    return train_step


@functools.cache
def _score(seed: int) -> Any:
    points, labels = data(seed)
    return jax.jit(lambda params: _loss(params, jnp.asarray(points), jnp.asarray(labels)))


def evaluate(state: State, seed: int) -> Evaluation:
    _, labels = data(seed)
    loss, logits = _score(seed)(state.params)
    return Evaluation(float((logits.argmax(-1) == labels).mean()), float(loss), {"stream1": 0.25})


def fit(
    workdir: Any,
    config: Any = None,
    *,
    feed: Any = None,
    train_step: Any = None,
    data_checksum: str = "0" * 64,
    **more: Any,
) -> Any:
    from mpisjax import configuration
    from mpisjax.storage import record
    from mpisjax.training import fit as fitting
    from mpisjax.training.loop import LoopSettings

    config = config or get_config()
    settings = LoopSettings(**{name: config.train[name] for name in LoopSettings._fields if name in config.train})
    plain = configuration.to_plain(config)
    parts: dict[str, Any] = {
        "eval_fn": lambda state: evaluate(state, 1),
        "test_fn": lambda state: evaluate(state, 2),
        "origin": record.Origin(plain, {}, data_checksum),
    }
    return fitting.train(
        settings,
        workdir,
        state=init_state(config),
        train_step=train_step or make_train_step(config),
        feed=feed or Feed(),
        **{**parts, **more},
    )


if __name__ == "__main__":
    import argparse

    from mpisjax import cli
    from mpisjax.cli.arguments import Parser
    from mpisjax.configuration.config_files import load_config

    parser = Parser()
    parser.add_argument("--slow", type=float, default=0.0, help="seconds to wait before each step")
    parser.add_argument("--workdir", required=True, help="the run's folder")

    def main(given: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
        from mpisjax.analysis.curves import draw_curves

        fit(
            given.workdir,
            config,
            feed=Feed(slow=given.slow),
            on_end=lambda folder: draw_curves(folder, "tiny"),
        )

    cli.run(main, parser, lambda given, file: load_config(file or __file__))
