"""Every setting of a run, in one table: its default, its meaning, and the values that it can take.

`mpisjax.configuration.base` makes the `ConfigDict` from it, `rules.check` its rules, and `python train.py
--help` its text. A setting's type is that of its default.
"""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """One setting.

    Attributes:
        default: The value where a config file says nothing; a tuple holds numbers above 0.
        meaning: One line.
        least: The smallest value.
        above: A number that every value is above.
        below: A number that every value is below.
        choices: All values, where they are few.
    """

    default: Any
    meaning: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {
    "name": Setting("unnamed", "name of the run; its folder is runs/NAME unless --workdir says otherwise"),
    "seed": Setting(0, "of the initial weights, the order of the examples, augmentation and dropout"),
    "data.name": Setting("digits", "the data set"),
    "data.dir": Setting("", "folder with the set's files, or one's own .npz file; empty: prepared data or a download"),
    "data.cache_dir": Setting("", "folder for decoded arrays; empty: the user's cache folder"),
    "data.source": Setting("auto", "where the data come from: auto, tfds, files or download"),
    "data.num_validation": Setting(0, "examples of the train split that are held out for validation"),
    "data.validation_share": Setting(0.0, "or their share, where data.num_validation is 0", least=0, below=1),
    "data.split_seed": Setting(0, "chooses the examples that are held out"),
    "data.test_share": Setting(0.2, "own data without a test split: the share that becomes it", above=0, below=1),
    "data.invalid": Setting(
        "refuse", "what happens to own files and to recordings that cannot be used", choices=("refuse", "skip")
    ),
    "data.image_size": Setting(32, "folder: side in pixels that images are brought to; 0: as they are", least=0),
    "data.fit": Setting("letterbox", "folder: the whole image on black, or its middle", choices=("letterbox", "crop")),
    "data.color": Setting("auto", "folder: convert images; auto: as they are", choices=("auto", "grey", "rgb")),
    "data.value_range": Setting("", "arrays, and 16-bit images: lowest and highest number, such as 0,1; empty: bytes"),
    "data.sensor_size": Setting("", "recordings: WIDTHxHEIGHT in pixels; empty: found from the events"),
    "data.crop": Setting(0, "event sets: side of the centre crop in pixels; 0: none"),
    "data.num_frames": Setting(30, "event sets: frames a recording"),
    "data.steps_per_frame": Setting(1, "event sets: steps of the simulation that each frame drives", least=1),
    "data.frames": Setting("count", "event sets: count events in a pixel, or binary"),
    "data.binning": Setting("time", "event sets: frames of equal time, or of equal event count (count)"),
    "data.denoise_us": Setting(0.0, "event sets: drop events without a neighbour for so many microseconds; 0: none"),
    "data.unsorted_events": Setting(
        "refuse",
        "event sets: what happens to a recording whose time goes back",
        choices=("refuse", "sort", "skip"),
    ),
    "data.augment.flip": Setting(False, "mirror an image with probability 1/2"),
    "data.augment.rotate": Setting(0.0, "turn by up to so many degrees", least=0),
    "data.augment.zoom": Setting(0.0, "scale by a factor of up to 1 + zoom, or its inverse", least=0),
    "data.augment.shift": Setting(0, "move by up to so many pixels", least=0),
    "data.augment.cutout": Setting(0, "side of a blanked square in pixels", least=0),
    "data.augment.mixup": Setting(0.0, "parameter of the beta distribution that mixes two images; 0: none", least=0),
    "model.name": Setting("mpis", "mpis, or package.module:function of (data set, settings): a network of your own"),
    "model.stem": Setting((16,), "channels of the stem's convolutions"),
    "model.stem_strides": Setting((1,), "their strides"),
    "model.layers": Setting((32, 48), "channels of each stream's layers"),
    "model.num_streams": Setting(2, "streams; each works at half the resolution of the one before"),
    "model.fusion_layer": Setting(2, "the layer, from 1, at which streams are fused"),
    "model.stride_layer": Setting(2, "the layer, from 1, that halves the resolution"),
    "model.kernel_size": Setting(3, "side of the convolutions' kernels in pixels"),
    "model.feedback_gain": Setting(0.5, "initial gain of the feedback's weight normalisation"),
    "model.feedback_norm": Setting(
        "weight", "weight; spectral: the feedback's operator norm stays below 1; none: no feedback"
    ),
    "model.head": Setting("fused", "fused: all streams are classified; smallest: the smallest alone"),
    "model.neurons": Setting((), "kinds of neuron by layer: lif, ternary or, say, graded3; empty: lif in all"),
    "model.learn_threshold": Setting(False, "train a threshold for every channel"),
    "model.dropout": Setting(0.0, "share of the activities that one mask a forward pass drops"),
    "model.momentum": Setting(0.9, "of batch normalisation's running statistics"),
    "model.dtype": Setting("float32", "of currents and rates", choices=("float32", "bfloat16")),
    "neuron.threshold": Setting(1.0, "membrane potential at which a neuron fires"),
    "neuron.leak": Setting(1.0, "share of the potential that a time step keeps; 1: integrate and fire"),
    "neuron.initial_potential": Setting(0.5, "membrane potential before the first step, in thresholds"),
    "forward.mode": Setting(
        "spikes", "how training finds the equilibrium; evaluation simulates spikes", choices=("spikes", "rates")
    ),
    "forward.num_steps": Setting(30, "spikes: time steps T"),
    "forward.settle_tol": Setting(0.0, "spikes: stop when the rates settle to this; 0: run all steps", least=0),
    "forward.residual_tol": Setting(0.25, "spikes: relative residual up to which they count as converged", above=0),
    "forward.solver": Setting("picard", "rates: picard or anderson"),
    "forward.max_steps": Setting(12, "rates: steps of the solver at most"),
    "forward.tol": Setting(1e-2, "rates: relative residual at which the solver stops"),
    "forward.history": Setting(3, "rates: iterates that anderson mixes"),
    "forward.damping": Setting(0.0, "rates: share of the old iterate that a step keeps"),
    "forward.returns": Setting(
        "equivalent", "the rates that the classifier is trained on", choices=("equivalent", "spikes")
    ),
    "adjoint.solver": Setting(
        "neumann", "of the backward pass: neumann, anderson, gmres, bicgstab, normal_cg or phantom"
    ),
    "adjoint.max_steps": Setting(12, "steps of that solver at most"),
    "adjoint.tol": Setting(1e-2, "relative residual at which it stops"),
    "adjoint.history": Setting(5, "iterates that anderson mixes, or directions of gmres before it restarts"),
    "adjoint.damping": Setting(0.0, "share of the old iterate that a step keeps"),
    "bptt.surrogate": Setting("triangular", "surrogate gradient: rectangular, triangular, arctan or sigmoid"),
    "bptt.readout": Setting("rate", "what the classifier sees: rate or membrane"),
    "bptt.times": Setting((), "low latency: train on the rates after each of these numbers of steps, as (1, 2, 4)"),
    "bptt.remat": Setting(False, "compute each step again in the backward pass, to save memory"),
    "train.method": Setting(
        "implicit", "implicit, or bptt: the simulation is differentiated through time", choices=("implicit", "bptt")
    ),
    "train.init_from": Setting("", "a run's folder or a pretrained network's name: start from its weights"),
    "train.epochs": Setting(10, "passes over the train split", least=1),
    "train.batch_size": Setting(128, "examples a step, over all devices", least=1),
    "train.accumulate": Setting(1, "passes a step, over parts of the batch with statistics of their own", least=1),
    "train.optimizer": Setting(
        "sgd", "sgd, adamw, lion, or package.module:function of the schedule, which gives an optax optimiser"
    ),
    "train.learning_rate": Setting(0.1, "highest learning rate; adamw and lion need less, such as 0.001", above=0),
    "train.momentum": Setting(0.9, "sgd: Nesterov momentum; 0: none", least=0, below=1),
    "train.weight_decay": Setting(5e-4, "of kernels; gains, scales and shifts have none", least=0),
    "train.feedback_decay": Setting(0.0, "weight decay of the gains that scale the feedback", least=0),
    "train.warmup_epochs": Setting(1.0, "epochs in which the learning rate rises", least=0),
    "train.schedule": Setting(
        "cosine", "how the learning rate falls: cosine, step, or package.module:function, called with (rate, steps)"
    ),
    "train.milestones": Setting((0.5, 0.75), "schedule step: shares of the run after which the rate falls"),
    "train.decay": Setting(0.1, "schedule step: the factor by which it falls"),
    "train.label_smoothing": Setting(0.0, "share of the target spread over all classes", least=0, below=1),
    "train.class_weights": Setting("", "factors of the classes in the loss, as 1,1,2; balanced: by rarity; empty: 1"),
    "train.rate_penalty": Setting(0.0, "weight of the mean firing rate of all layers in the loss; 0: none", least=0),
    "train.gradient_clip": Setting(0.0, "largest global norm of the gradient; 0: no limit", least=0),
    "train.jacobian_penalty": Setting(0.0, "weight of ||J||_F^2 / n of the rate map in the loss; 0: none", least=0),
    "train.ema": Setting(0.0, "decay of the averaged weights that evaluation uses; 0: none", least=0, below=1),
    "train.patience": Setting(0, "epochs without a better validation after which training ends; 0: never", least=0),
    "train.test_at_end": Setting(True, "measure the test split when training is over"),
    "train.log_every": Setting(50, "steps from one row of metrics to the next", least=1),
    "train.checkpoint_every": Setting(0, "steps from one save to the next within an epoch; 0: none there", least=0),
    "train.checkpoint_seconds": Setting(
        20.0, "seconds from one saved epoch to the next, unless it is the best or the last; grows with the run", least=0
    ),
    "train.keep_checkpoints": Setting(2, "latest checkpoints to keep beside the best", least=1),
    "train.max_skipped": Setting(10, "steps in a row without a finite gradient after which training stops", least=1),
    "eval.batch_size": Setting(256, "examples at once in evaluation", least=1),
    "devices.all_cores": Setting(True, "CPU: the cores share a batch; false: one core"),
    "devices.model_parallel": Setting(1, "devices that share each layer's channels; 1: they split the batch", least=1),
}  # fmt: skip


def values(setting: Setting) -> str:
    """What a setting can be, as a phrase that ends its meaning; empty where its type says all."""
    if setting.choices:
        return " or ".join(setting.choices)
    bounds = [(setting.least, "at least"), (setting.above, "above"), (setting.below, "below")]
    return " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound)


def help_text() -> str:
    """All settings with defaults and meanings, for a program's --help."""
    lines, width, column = [], 120, 43
    for name, setting in SETTINGS.items():
        default = str(setting.default).replace(" ", "")
        rules = f" ({phrase})" if (phrase := values(setting)) else ""
        text = textwrap.wrap(f"{setting.meaning}{rules}", width - column)
        lines.append(f"  --config.{name}={default}".ljust(column - 1) + f" {text[0]}")
        lines += [" " * column + line for line in text[1:]]
    return "\n".join(lines)
