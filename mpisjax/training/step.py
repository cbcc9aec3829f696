"""One training step, `jit`-compiled and sharded: augment, find the equilibrium, differentiate, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Augmentation, Batch, Inputs, augment, mixup, normalize
from mpisjax.data.augment import over_time
from mpisjax.implicit import adjoint_probe
from mpisjax.neurons import LIF
from mpisjax.residuals import global_norm
from mpisjax.simulate import SpikeForward
from mpisjax.solvers import Adjoint, RateForward
from mpisjax.training.devices import batch_sharding, replicated, shard_channels, state_sharding
from mpisjax.training.loss import LossFn, make_loss
from mpisjax.training.state import TrainState

Array = jax.Array


class Metrics(NamedTuple):
    """What a training step reports; float32 scalars.

    Attributes:
      loss: as trained: cross-entropy, smoothed, and the penalties where there are any.
      accuracy: on the augmented batch, by the readout that is trained.
      grad_norm: global norm of the gradient.
      learning_rate: of this step; NaN where nobody knows it.
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


class Gradients(NamedTuple):
    """Of one forward and backward pass, or the means over several.

    Attributes:
      grads: like the parameters.
      batch_stats: running statistics after the last pass.
      means: those of the `Metrics` that a pass measures.
    """

    grads: Any
    batch_stats: Any
    means: dict[str, Array]


def make_train_step(
    network: Any,
    optimizer: optax.GradientTransformation,
    *,
    inputs: Inputs,
    neuron: LIF,
    forward: SpikeForward | RateForward,
    adjoint: Adjoint | None = None,
    bptt: BPTT | None = None,
    returns: str = "equivalent",
    schedule: optax.Schedule | None = None,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (a tuple of constants)
    mixup: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    jacobian_weight: float = 0.0,
    rate_weight: float = 0.0,
    averaging: float = 0.0,
    accumulate: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One step of training.

    Args:
      network: the network.
      optimizer: what makes updates of gradients.
      inputs: normalisation, class count, and whether input is over time.
      neuron: of the populations that bring none.
      forward: how the equilibrium is found.
      adjoint: how the backward pass is solved; None: as `equilibrium_forward` does by default.
      bptt: differentiate the simulation of `forward` through time instead.
      returns: what the classifier sees: "equivalent" or "spikes"; see `equilibrium_forward`.
      schedule: gives the learning rate of a step, which the metrics report. None: read from the optimiser's state,
        where `optax.inject_hyperparams` has put it.
      augmentation: how images are changed.
      mixup: parameter of the beta distribution that mixes two images; 0: none.
      label_smoothing: share of the target that is spread over all classes.
      class_weights: factors of the samples' cross-entropies, by class; empty: 1. The loss is the mean over the batch.
      jacobian_weight: weight of ||J||_F^2 / n of the equivalent map in the loss.
      rate_weight: weight of the populations' mean firing rate in the loss.
      averaging: decay of averaged weights, which the state must have then; 0: none.
      accumulate: parts of the batch that are passed one by one.
      mesh: devices to share the batch; None: the default one.

    Returns:
      `step(state, batch) -> (state, metrics)`; the state's buffers are donated. A step whose loss or gradient is
      not finite leaves parameters, optimiser and statistics as they were and counts itself.
    """
    network = network if mesh is None else shard_channels(network, mesh)
    loss_fn = make_loss(
        network,
        neuron=neuron,
        forward=forward,
        adjoint=adjoint,
        bptt=bptt,
        returns=returns,
        class_weights=class_weights,
        jacobian_weight=jacobian_weight,
        rate_weight=rate_weight,
    )
    gradients = accumulated(make_gradients(loss_fn), accumulate, batch_axis=1 if inputs.temporal else 0)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, mixup_key, dropout_key = jax.random.split(jax.random.fold_in(state.rng, state.step), 3)
        images = augment(augment_key, batch.images, augmentation)
        targets = jax.nn.one_hot(batch.labels, inputs.num_classes)
        x, targets = mixed(mixup_key, images, targets, inputs, mixup)
        targets = optax.smooth_labels(targets, label_smoothing) if label_smoothing else targets
        found = gradients(state.params, state.batch_stats, x, targets, dropout_key)
        new, norm, finite = updated(state, found, optimizer, averaging)
        rate = schedule(state.step) if schedule is not None else learning_rate_of(state.opt_state)
        metrics = Metrics(**found.means, grad_norm=norm, learning_rate=rate, finite=finite, skipped=new.skipped)
        return new, Metrics(*(jnp.asarray(m, jnp.float32) for m in metrics))

    return compiled(step, mesh)


def make_gradients(loss_fn: LossFn) -> Callable[..., Gradients]:
    """`gradients(params, batch_stats, x, targets, rng) -> Gradients` of one pass."""

    def gradients(params: Any, batch_stats: Any, x: Array, targets: Array, rng: Array) -> Gradients:
        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, out), (grads, adjoint_stats) = differentiate(params, adjoint_probe(), batch_stats, x, targets, rng)
        equilibrium = out.equilibrium
        means = {
            "loss": loss,
            "accuracy": jnp.mean(jnp.argmax(out.logits, -1) == jnp.argmax(targets, -1)),
            "forward_steps": equilibrium.num_steps,
            "forward_residual": jnp.max(jnp.stack([jnp.mean(r) for r in jax.tree.leaves(equilibrium.residual)])),
            "forward_converged": jnp.mean(equilibrium.converged),
            "adjoint_steps": adjoint_stats.num_steps,
            "adjoint_residual": adjoint_stats.residual,
        }
        return Gradients(grads, out.batch_stats, means)

    return gradients


def accumulated(gradients: Callable[..., Gradients], parts: int, batch_axis: int) -> Callable[..., Gradients]:
    """The like of `gradients`, with the batch passed in parts, one after the other; each has its own batch
    statistics.
    """
    if parts == 1:
        return gradients

    def split(a: Array, axis: int) -> Array:
        # Part n takes rows n, n + parts, ...: each device's rows stay on it.
        a = a.reshape(*a.shape[:axis], -1, parts, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, axis + 1, 0)

    def wide(leaf: Any) -> Any:
        return leaf.dtype if leaf.dtype == jnp.float64 else jnp.float32

    def in_parts(params: Any, batch_stats: Any, x: Array, targets: Array, rng: Array) -> Gradients:
        def one(carry: tuple[Any, Any], part: Any) -> Any:
            number, x, targets = part
            sums, batch_stats = carry
            found = gradients(params, batch_stats, x, targets, jax.random.fold_in(rng, number))
            numbers = jax.tree.map(lambda a: a.astype(wide(a)), found)._replace(batch_stats=())
            return (jax.tree.map(jnp.add, sums, numbers), found.batch_stats), None

        xs = (jnp.arange(parts), split(x, batch_axis), split(targets, 0))
        shapes = jax.eval_shape(gradients, params, batch_stats, xs[1][0], xs[2][0], rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), shapes._replace(batch_stats=()))
        (sums, batch_stats), _ = jax.lax.scan(one, (zeros, batch_stats), xs)
        return jax.tree.map(lambda a: a / parts, sums)._replace(batch_stats=batch_stats)

    return in_parts


def mixed(key: Array, images: Array, targets: Array, inputs: Inputs, alpha: float) -> tuple[Array, Array]:
    """The network's input and targets of a batch of bytes: normalised, and mixed two by two where `alpha` says so."""
    x, targets = mixup(key, normalize(images, inputs.mean, inputs.std), targets, alpha)
    return over_time(x, inputs.steps_per_frame) if inputs.temporal else x, targets


def updated(
    state: TrainState, found: Gradients, optimizer: optax.GradientTransformation, averaging: float
) -> tuple[TrainState, Array, Array]:
    """The state after a step, the gradient's norm, and whether all was finite; where it was not the step is skipped."""
    updates, opt_state = optimizer.update(found.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = global_norm(found.grads)
    finite = jnp.isfinite(found.means["loss"]) & jnp.isfinite(norm)

    def keep(new: Any, old: Any) -> Any:
        # In the dtype of the old, which x64 widens here and there.
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)

    ema = state.ema
    if averaging:
        # Warmed up, so that the average does not remember the initial weights.
        rate = jnp.minimum(averaging, (1 + state.step) / (10 + state.step))
        current = {"params": params, "batch_stats": found.batch_stats}
        ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, current)
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        batch_stats=keep(found.batch_stats, state.batch_stats),
        opt_state=keep(opt_state, state.opt_state),
        ema=keep(ema, state.ema),
        skipped=jnp.where(finite, 0, state.skipped + 1),
        rng=state.rng,
    )
    return new, norm, finite


def learning_rate_of(opt_state: Any) -> Any:
    """The learning rate that `optax.inject_hyperparams` keeps in an optimiser's state; NaN where there is none."""
    return optax.tree_utils.tree_get(opt_state, "learning_rate", default=jnp.nan)


def compiled(step: Callable[..., Any], mesh: jax.sharding.Mesh | None) -> Callable[..., Any]:
    """A step, `jit`-compiled for the devices that share its batch; the state is donated."""
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    whole = replicated(mesh)
    if "model" not in mesh.axis_names:
        shardings: Any = (whole, batch_sharding(mesh))
        return jax.jit(step, donate_argnums=0, in_shardings=shardings, out_shardings=whole)

    def placed(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch)
        return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh)), metrics

    # The state comes as `state_sharding` lays it.
    shardings = (None, batch_sharding(mesh))
    return jax.jit(placed, donate_argnums=0, in_shardings=shardings, out_shardings=(None, whole))
