"""One self-contained HTML page of a run."""

from __future__ import annotations

import base64
import functools
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from matplotlib.figure import Figure

from mpisjax.analysis import figures
from mpisjax.analysis.anytime import record
from mpisjax.analysis.classes import Mistake, by_class
from mpisjax.analysis.curves import NAMES, training_figures
from mpisjax.analysis.dynamics import dynamics, raster
from mpisjax.analysis.measure import first_examples, measure
from mpisjax.baselines.bptt import BPTT
from mpisjax.data import Split, prepare_images
from mpisjax.jacobian import SpectralRadius, warn_near_one
from mpisjax.neurons import LIF
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import CONSTANTS, Cost, dense_cost
from mpisjax.solvers import RateForward
from mpisjax.storage.run_folder import write_atomically
from mpisjax.training.evaluation import Evaluation
from mpisjax.training.metrics import FILE_NAME, read_rows

STEPS = (1, 2, 5, 10, 20, 30)
EXAMPLES, FOLLOWED, CONVERGENCE_STEPS = 1000, 16, 100
MOST_MISTAKES = 40


class Subject(NamedTuple):
    """What a report is about.

    Attributes:
        name: The run's name.
        method: How it was trained, in a word.
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        neuron: Its neurons.
        num_steps: Time steps T that it was trained for.
        solver: The rate solver of evaluations.
        evaluations: Evaluations of f that its training's rate solver may take.
        through_time: How it answers if it was trained through time; else None.
        settings: All settings of the run, as JSON can hold them.
        classes: The names of the classes.
    """

    name: str
    method: str
    net: Any
    variables: dict[str, Any]
    neuron: LIF
    num_steps: int
    solver: RateForward
    evaluations: int
    through_time: BPTT | None
    settings: dict[str, Any]
    classes: tuple[str, ...]


def write_report(
    subject: Subject,
    dataset: Any,
    split: Split,
    workdir: str | Path,
    path: str | Path,
    steps: Sequence[int] = STEPS,
    examples: int | None = EXAMPLES,
    figure_folder: str | Path | None = None,
) -> None:
    """Measures a network and writes what was found as one HTML file that needs no other.

    Args:
        subject: The network and what to know of it.
        dataset: Normalisation and kind of input.
        split: Examples and labels to measure on.
        workdir: The run's folder, for its `metrics.jsonl`; without that file the training curves are left
            out.
        path: The file to write, whole or not at all.
        steps: Numbers of time steps to compare, where the input is constant in time.
        examples: Measure on at most so many examples of the split; None: on all.
        figure_folder: Also write every plot there, as NAME.svg; None: nowhere.
    """
    net, variables, neuron = subject.net, subject.variables, subject.neuron
    part = first_examples(split, examples)
    measured = functools.partial(
        measure, net, variables, dataset, part, neuron=neuron, through_time=subject.through_time
    )
    examined, cost = measured(num_steps=subject.num_steps)
    usual, num_steps = examined.evaluation, round(examined.evaluation.num_steps)
    classes = by_class(part.labels, examined.answers, examined.confidence, subject.classes)
    compared = [] if dataset.temporal else [measured(num_steps=t) for t in steps]
    scores, costs = [found.evaluation for found, _ in compared], [cost for _, cost in compared if cost is not None]

    few = first_examples(split, FOLLOWED)
    images = prepare_images(jnp.asarray(np.asarray(few.images[np.arange(len(few.labels))])), dataset)
    curves, radius = dynamics(
        net,
        variables,
        images,
        neuron=neuron,
        solver=subject.solver,
        num_steps=len(images) if dataset.temporal else CONVERGENCE_STEPS,
    )
    one = images[:, :1] if dataset.temporal else images[:1]
    spikes = raster(net, variables, one, neuron, num_steps)
    asked = record(net, variables, dataset, part, neuron=neuron, num_steps=num_steps)

    dense = dense_cost(net, variables, one, neuron, subject.evaluations)
    rows = read_rows(Path(workdir) / FILE_NAME)
    drawn = {
        **(training_figures(rows) if rows else {}),
        "confusion": figures.confusion(classes.confusion, subject.classes),
        "firing_rates": figures.firing_rates(usual.firing_rates),
        "misclassified": _contact_sheet(part, classes.mistakes),
        "change": figures.settling("change in a step, ‖r(t) - r(t-1)‖", curves.change),
        "residual": figures.settling("residual, ‖f(r(t)) - r(t)‖", curves.residual),
        "spectral_radius": figures.radii(np.asarray(radius.value)),
        "raster": figures.raster(spikes),
        "time_steps": figures.against_steps(scores) if scores else None,
        "work": figures.against_work(scores, [sum(one.synops.values()) for one in costs]) if costs else None,
        "anytime": figures.anytime(asked),
    }
    plots = {name: figures.as_svg(figure) for name, figure in drawn.items() if figure is not None}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpisjax.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        name=subject.name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=_facts(subject, dataset.source, len(part.labels), len(split.labels), usual, radius),
        warning=warn_near_one(radius.value),
        training=[name for name in NAMES if name in plots],
        plots={name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in plots.items()},
        num_steps=num_steps,
        cost=cost,
        shown_mistakes=MOST_MISTAKES,
        raster_class=subject.classes[int(few.labels[0])],
        compared=[_latency_row(found.evaluation, cost) for found, cost in compared],
        layers=_layer_rows(cost) if cost else None,
        dense=dense,
        evaluations=subject.evaluations,
        constants=CONSTANTS,
        settings=json.dumps(subject.settings, indent=1),
        millions=_millions,
    )
    write_atomically(Path(path), page.encode())
    if figure_folder is not None:
        for name, svg in plots.items():
            write_atomically(Path(figure_folder) / f"{name}.svg", svg)


def _contact_sheet(part: Split, mistakes: list[Mistake]) -> Figure | None:
    """The misclassified examples, the surest first; None where all are right."""
    found = sorted(mistakes, key=lambda one: -one.confidence)[:MOST_MISTAKES]
    if not found:
        return None
    images = np.asarray(part.images[np.array([one.example for one in found])])
    titles = [f"{one.example}: {one.label} taken\nfor {one.answer}, {100 * one.confidence:.0f}%" for one in found]
    return figures.contact_sheet(images, titles)


def _facts(
    subject: Subject, source: str, number: int, whole: int, usual: Evaluation, radius: SpectralRadius
) -> list[tuple[str, str]]:
    """What the page says first: a name and a value each."""
    device = jax.devices()[0]
    kind = (
        f"{subject.net.num_streams} streams"
        if isinstance(subject.net, MPIS)
        else type(getattr(subject.net, "network", subject.net)).__name__
    )
    measured = f"all {whole:,}" if number == whole else f"the first {number:,} of {whole:,}"
    return [
        ("data", source),
        ("network", f"{kind}, {model.parameter_count(subject.variables):,} parameters"),
        ("method", subject.method),
        ("measured on", f"{measured} examples, T = {usual.num_steps:.0f}"),
        ("accuracy, as trained", f"{100 * usual.accuracy:.2f}%"),
        ("accuracy, spikes alone", f"{100 * (usual.accuracy_spikes or 0):.2f}%"),
        ("relative residual", ", ".join(f"{k} {v:.3g}" for k, v in usual.residual.items())),
        (
            "spectral radius of the Jacobian",
            f"{np.median(radius.value):.3f} in the median, {radius.value.max():.3f} at most, of {len(radius.value)} "
            f"examples; estimated to within {100 * np.max(radius.error):.1g}%",
        ),
        ("machine", f"{device.device_kind} ({len(jax.devices())}), {platform.machine()}, JAX {jax.__version__}"),
    ]


def _millions(value: float) -> str:
    return f"{value / 1e6:.3f}"


def _latency_row(found: Evaluation, cost: Cost | None) -> list[str]:
    row = [f"{found.num_steps:.0f}", f"{100 * found.accuracy:.2f}%", f"{100 * (found.accuracy_spikes or 0):.2f}%"]
    row.append(f"{max(found.residual.values()):.3f}")
    if cost is None:
        return row
    return [*row, _millions(sum(cost.synops.values())), f"{cost.compute_uj:,.1f}", f"{cost.memory_uj:,.0f}"]


def _layer_rows(cost: Cost) -> list[list[str]]:
    """Synaptic operations by population, multiply-accumulates of the rest, and their sums."""
    rows = [[name, _millions(value), ""] for name, value in cost.synops.items()]
    rows += [[name, "", _millions(value)] for name, value in cost.macs.items()]
    return [*rows, ["sum", _millions(sum(cost.synops.values())), _millions(sum(cost.macs.values()))]]
