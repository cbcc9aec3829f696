"""One export to NIR: fold, round to integers if asked, write, check, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpisjax.configuration import makers
from mpisjax.errors import UserError
from mpisjax.export import check, cost, finetune, folded, nir_graph, nir_host, nir_nodes, quantise
from mpisjax.export.check import Exported
from mpisjax.export.stablehlo import inference
from mpisjax.nn.mpis import MPIS
from mpisjax.pretrained import Trained

CALIBRATION = 256  # training images


class Options(NamedTuple):
    """What to export; the command line's options of the same names."""

    neurons: str = "exact"
    stem: str = "spikes"
    head: str = "spikes"
    unrolled: int | None = None
    weights: str = "float32"
    check: int | None = None
    cost: bool = False
    num_steps: int = 16
    finetune: int | None = None


def prepare(trained: Trained, options: Options, dtype: Any = np.float32, folder: Path | None = None) -> Exported:
    """Folds a trained network, and rounds it to integers where the options say so.

    Args:
        trained: The network.
        options: What to export.
        dtype: Of the arithmetic with float weights.
        folder: Where fine-tuning keeps its run, if the options ask for it.

    Raises:
        UserError: The network cannot be written, or training images for the calibration are missing.
    """
    inputs = trained.inputs
    if not isinstance(trained.net, MPIS):
        raise UserError(
            f"{trained.name} is a network of your own, which has no export to NIR yet: export it to StableHLO."
        )
    if inputs.steps_per_frame > 1:
        raise UserError(
            f"{trained.name} takes each frame for {inputs.steps_per_frame} steps (data.steps_per_frame), which a NIR "
            "graph does not say: export it to StableHLO."
        )
    form = folded.Form(trained.net, trained.neuron, (inputs.shape[-3], inputs.shape[-2]), options.stem, options.head)
    nir_graph.check(form)
    wide = np.dtype(dtype) == np.float64 or options.weights != "float32"
    with jax.enable_x64(wide):
        dtype = np.float64 if wide else np.float32
        network = folded.fold_network(form, jax.tree.map(lambda a: np.asarray(a, dtype), trained.variables))
        pixels = {"mean": np.asarray(inputs.mean, dtype), "std": np.asarray(inputs.std, dtype)}
        if options.weights == "float32":
            return Exported(form, network, pixels)
        quantise.check(form)
        if form.stem_spikes:
            network, offset = quantise.pixel_network(form, network, inputs.mean, inputs.std)
            pixels = {"offset": offset}
        exported, dataset = Exported(form, network, pixels), makers.make_dataset(trained.config)
        x = exported.encode(exported.read(dataset.train.images[:CALIBRATION]))
        bits = quantise.BITS[options.weights]

        def tune(layers: folded.Layers, gain: folded.Layers) -> folded.Layers:
            if not options.finetune:
                return layers
            assert folder is not None
            start, mean, std = network._replace(layers=layers), np.asarray(inputs.mean), np.asarray(inputs.std)
            rounded = finetune.Rounded(form, start, gain, bits, mean, std)
            how = _as_trained(trained.config)
            return finetune.tuned(rounded, dataset, options.finetune, options.num_steps, folder, **how)

        rounded = quantise.quantise(form, network, x, bits, options.num_steps, tune)
        if not form.stem_spikes:
            pixels = {**pixels, "scale": np.array([form.threshold / quantise.UNITS])}
        return Exported(form, rounded, pixels)


def _as_trained(config: Any) -> dict[str, Any]:
    """The arguments of `mpisjax.fit` that a network was trained with, for its rates."""
    config = config.copy_and_resolve_references()
    config.forward.mode = "rates"
    return {
        "forward": makers.make_forward(config),
        "adjoint": makers.make_adjoint(config),
        "augmentation": makers.make_augmentation(config),
        "mixup": config.data.augment.mixup,
        "label_smoothing": config.train.label_smoothing,
        "batch_size": config.train.batch_size,
        "seed": config.seed,
    }


def graph_of(exported: Exported, options: Options, name: str = "") -> Any:
    """The NIR graph."""
    about = {"name": name, "num_steps": options.num_steps, "weights": options.weights}
    return nir_graph.to_nir(
        exported.form, exported.network, neurons=options.neurons, unrolled=options.unrolled or 0,
        pixels=exported.pixels, about=about,
    )  # fmt: skip


def export_nir(trained: Trained, options: Options, out: Path) -> str:
    """Writes the file, and checks and estimates what the options ask for.

    Returns:
        What to tell the user.

    Raises:
        UserError: The network cannot be written, the data are missing, or the check failed.
    """
    exported = prepare(trained, options, folder=out.with_name(f"{out.name}.finetune"))
    graph = graph_of(exported, options, trained.name)
    nir, draft = nir_nodes.package(), out.with_name(f"{out.name}.draft")
    try:
        nir.write(draft, graph)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    lines = [f"{out}: {out.stat().st_size:,} bytes, {len(graph.nodes)} nodes, {len(graph.edges)} edges"]
    if options.check or options.cost:
        test = makers.make_dataset(trained.config).test
        count = min(options.check or 64, len(test.labels))
        images, labels = np.asarray(test.images[:count]), np.asarray(test.labels[:count])
        found, report = _checked(trained, exported, options, out, images, labels)
        lines += report
        if options.cost:
            steps = images.shape[1] if trained.net.temporal else options.num_steps
            spikes = {name: total / count for name, total in found.spikes.items()}
            lines += cost.report(exported.form, exported.network, options.weights, spikes, steps)
    return "\n".join(lines)


def _checked(
    trained: Trained, exported: Exported, options: Options, out: Path, images: Any, labels: Any
) -> tuple[check.Checked, list[str]]:
    """Runs the file, compares every spike, and says what was found."""
    nir, steps = nir_nodes.package(), options.num_steps
    exact, twin = exported, nir.read(out)
    if options.weights == "float32":  # rounding may move a spike in float32: the comparison is in float64
        exact = prepare(trained, options, np.float64)
        twin = graph_of(exact, options)
    found, count = check.spike_for_spike(exact, twin, images, steps), len(images)
    numbers = "float64" if options.weights == "float32" else "integers"
    total = sum(found.spikes.values())
    steps = images.shape[1] if trained.net.temporal else steps
    lines = [
        f"checked {count} test images, {steps} steps, from image to class, in NumPy ({numbers}): all "
        f"{total:,} spikes of {len(found.spikes)} populations are mpisjax's own, in the same step; all classes "
        "are the same"
    ]
    classes = found.classes
    if options.weights == "float32":
        parts = (nir_host.run(nir.read(out), images[i : i + 64], steps) for i in range(0, count, 64))
        classes = np.concatenate([part.scores.argmax(-1) for part in parts])
        lines.append(f"the file itself, in float32: {np.sum(classes == found.classes)} of {count} classes the same")
    # By spikes alone, stem and head in float, as in evaluation.
    infer = jax.jit(inference(trained, None if trained.inputs.temporal else options.num_steps))
    own = np.concatenate([infer(jnp.asarray(images[i : i + 64]))["scores"].argmax(-1) for i in range(0, count, 64)])
    lines.append(
        f"accuracy on these images: {np.mean(classes == labels):.2%}; the trained network by its spikes alone "
        f"{np.mean(own == labels):.2%}, with the same class for {np.mean(own == classes):.2%}"
    )
    return found, lines
