"""One training step, `jit`-compiled and sharded: augment, find the equilibrium, differentiate, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mpisjax import configuration
from mpisjax.baselines import bptt
from mpisjax.data import Batch, augment, mixup, normalize
from mpisjax.equilibrium import adjoint_probe
from mpisjax.firing import RateReading
from mpisjax.jacobian import jacobian_penalty
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.residuals import global_norm
from mpisjax.simulate import weighted_mean_frame
from mpisjax.solvers import AdjointStats
from mpisjax.training.devices import batch_sharding, replicated, shard_channels, state_sharding
from mpisjax.training.state import TrainState, make_optimizer, make_schedule

Array = jax.Array


class Metrics(NamedTuple):
    """What a training step reports; float32 scalars.

    Attributes:
      loss: as trained: cross-entropy, smoothed, and the Jacobian penalty where there is one.
      accuracy: on the augmented batch, by the readout that is trained.
      grad_norm: global norm of the gradient.
      learning_rate: of this step.
      forward_steps: time steps, or solver steps.
      forward_residual: mean relative residual over samples, of the worst stream.
      forward_converged: share of samples that converged.
      adjoint_steps: products with J^T (-1: not counted by this solver).
      adjoint_residual: relative residual of the adjoint solve.
      finite: 1 if the step changed the parameters, 0 if it was skipped.
      skipped: steps in a row that were skipped.
    """

    loss: Array
    accuracy: Array
    grad_norm: Array
    learning_rate: Array
    forward_steps: Array
    forward_residual: Array
    forward_converged: Array
    adjoint_steps: Array
    adjoint_residual: Array
    finite: Array
    skipped: Array


class _Gradients(NamedTuple):
    """Of one forward and backward pass, or the means over several."""

    loss: Array
    grads: Any
    accuracy: Array
    forward_steps: Array
    forward_residual: Array
    forward_converged: Array
    adjoint: AdjointStats
    batch_stats: Any  # after the last pass


def prepare_images(images: Array, dataset: Any, dtype: Any = None) -> Array:
    """uint8 batch -> network input; frames [batch, time, ...] become [time, batch, ...]."""
    x = normalize(images, dataset.mean, dataset.std)
    x = x if dtype is None else x.astype(dtype)
    return x.swapaxes(0, 1) if dataset.temporal else x


def make_train_step(
    config: ml_collections.ConfigDict,
    net: MPIS,
    dataset: Any,
    steps_per_epoch: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for a config.

    Args:
      config: all settings.
      net: the network.
      dataset: its normalisation, class count and whether input is over time.
      steps_per_epoch: for the schedule.
      mesh: devices to share the batch; None: the default one.

    Returns:
      `step(state, batch) -> (state, metrics)`; the state's buffers are donated. A step whose loss or gradient is
      not finite leaves parameters, optimiser and statistics as they were and counts itself.
    """
    net = net if mesh is None else shard_channels(net, mesh)
    neuron, adjoint = configuration.make_neuron(config), configuration.make_adjoint(config)
    forward = configuration.make_forward(config, dataset.temporal)
    through_time = configuration.make_bptt(config)
    optimizer, schedule = make_optimizer(config, steps_per_epoch), make_schedule(config, steps_per_epoch)
    smoothing, averaging = config.train.label_smoothing, config.train.ema

    def loss_fn(params: Any, probe: Any, state: TrainState, x: Array, targets: Array, rng: Array) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        shared: dict[str, Any] = {"neuron": neuron, "train": True, "rng": rng}
        if through_time is None:
            shared["returns"] = config.forward.returns
            out = model.apply(net, variables, x, forward=forward, adjoint=adjoint, probe=probe, **shared)
        else:
            out = bptt.apply(net, variables, x, num_steps=forward.num_steps, bptt=through_time, **shared)
        loss = optax.softmax_cross_entropy(out.logits, targets).mean()
        if config.train.jacobian_penalty:
            # Of the map that is solved in evaluation: running statistics, nothing dropped.
            encoded = net.apply(variables, x, False, method="encode")
            encoded = weighted_mean_frame(encoded, neuron.leak) if net.temporal else encoded
            transition = model.transition_of(net)
            loss += config.train.jacobian_penalty * jacobian_penalty(
                lambda r: transition(variables, r, encoded, RateReading(neuron)),
                out.equilibrium.rates,
                jax.random.fold_in(rng, 1),
            )
        return loss, out

    def gradients_of_part(state: TrainState, x: Array, targets: Array, rng: Array) -> _Gradients:
        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, out), (grads, adjoint_stats) = differentiate(
            state.params, adjoint_probe(), state, x, targets, rng
        )
        equilibrium = out.equilibrium
        return _Gradients(
            loss=loss,
            grads=grads,
            accuracy=jnp.mean(jnp.argmax(out.logits, -1) == jnp.argmax(targets, -1)),
            forward_steps=equilibrium.num_steps,
            forward_residual=jnp.max(jnp.stack([jnp.mean(r) for r in jax.tree.leaves(equilibrium.residual)])),
            forward_converged=jnp.mean(equilibrium.converged),
            adjoint=adjoint_stats,
            batch_stats=out.batch_stats,
        )

    def gradients(state: TrainState, x: Array, targets: Array, rng: Array) -> _Gradients:
        parts = config.train.accumulate
        if parts == 1:
            return gradients_of_part(state, x, targets, rng)
        axis = 1 if dataset.temporal else 0

        def split(a: Array, axis: int) -> Array:
            # Part n takes rows n, n + parts, ...: each device's rows stay on it.
            a = a.reshape(*a.shape[:axis], -1, parts, *a.shape[axis + 1 :])
            return jnp.moveaxis(a, axis + 1, 0)

        def one(carry: tuple[Any, Any], part: Any) -> Any:
            number, x, targets = part
            sums, batch_stats = carry
            found = gradients_of_part(
                state._replace(batch_stats=batch_stats), x, targets, jax.random.fold_in(rng, number)
            )
            numbers = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), found)
            numbers = numbers._replace(batch_stats=())
            return (jax.tree.map(jnp.add, sums, numbers), found.batch_stats), None

        xs = (jnp.arange(parts), split(x, axis), split(targets, 0))
        shapes = jax.eval_shape(gradients_of_part, state, xs[1][0], xs[2][0], rng)._replace(batch_stats=())
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
        (sums, batch_stats), _ = jax.lax.scan(one, (zeros, state.batch_stats), xs)
        return jax.tree.map(lambda a: a / parts, sums)._replace(batch_stats=batch_stats)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        augment_key, mixup_key, dropout_key = jax.random.split(rng, 3)
        targets = jax.nn.one_hot(batch.labels, dataset.num_classes)
        x = augment(augment_key, batch.images, config.data.augment)
        if config.data.augment.mixup:
            x = normalize(x, dataset.mean, dataset.std)
            x, targets = mixup(mixup_key, x, targets, config.data.augment.mixup)
            x = x.swapaxes(0, 1) if dataset.temporal else x
        else:
            x = prepare_images(x, dataset)
        targets = optax.smooth_labels(targets, smoothing) if smoothing else targets

        found = gradients(state, x, targets, dropout_key)
        loss, grads = found.loss, found.grads
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def keep(new: Any, old: Any) -> Any:
            # In the dtype of the old, which x64 widens here and there.
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)

        ema = state.ema
        if averaging:
            # Warmed up, so that the average does not remember the initial weights.
            rate = jnp.minimum(averaging, (1 + state.step) / (10 + state.step))
            current = {"params": params, "batch_stats": found.batch_stats}
            ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, current)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = Metrics(
            loss=loss,
            accuracy=found.accuracy,
            grad_norm=norm,
            learning_rate=schedule(state.step),
            forward_steps=found.forward_steps,
            forward_residual=found.forward_residual,
            forward_converged=found.forward_converged,
            adjoint_steps=found.adjoint.num_steps,
            adjoint_residual=found.adjoint.residual,
            finite=finite,
            skipped=skipped,
        )
        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            batch_stats=keep(found.batch_stats, state.batch_stats),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            skipped=skipped,
            rng=state.rng,
        )
        return new, Metrics(*(jnp.asarray(m, jnp.float32) for m in metrics))

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    whole = replicated(mesh)
    if "model" in mesh.axis_names:

        def placed(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            state, metrics = step(state, batch)
            return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh)), metrics

        # The state comes as `state_sharding` lays it.
        shardings = (None, batch_sharding(mesh))
        return jax.jit(placed, donate_argnums=0, in_shardings=shardings, out_shardings=(None, whole))
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, batch_sharding(mesh)), out_shardings=whole)
