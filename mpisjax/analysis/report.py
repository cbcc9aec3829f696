"""One self-contained HTML page of a run."""

from __future__ import annotations

import html
import json
import platform
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mpisjax import configuration
from mpisjax.analysis import figures
from mpisjax.analysis.convergence import Curves, convergence
from mpisjax.analysis.measure import Measurement, first_examples, measure
from mpisjax.analysis.raster import raster
from mpisjax.data import Split
from mpisjax.jacobian import spectral_radius, warn_near_one
from mpisjax.neurons import RateReading
from mpisjax.nn import model
from mpisjax.nn.mpis import MPIS
from mpisjax.nn.operations import CONSTANTS, Cost, dense_cost, synapses
from mpisjax.simulate import weighted_mean_frame
from mpisjax.training.durable import write_atomically
from mpisjax.training.plots import save_curves
from mpisjax.training.step import prepare_images

STEPS = (1, 2, 5, 10, 20, 30)
EXAMPLES, FOLLOWED, CONVERGENCE_STEPS = 1000, 16, 100

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 75ch; } .quiet { color: #666; } .warning { background: #fdf1d8; padding: .5rem .8rem; }
img { max-width: 100%; height: auto; display: block; } .pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.pair > div { flex: 1 1 460px; min-width: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { padding: .25rem .8rem .25rem 0; text-align: left; }
th { border-bottom: 1px solid #bbb; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #eee; } details pre { font-size: 12px; white-space: pre-wrap; }
"""


def write_report(
    config: ml_collections.ConfigDict,
    net: MPIS,
    variables: dict[str, Any],
    dataset: Any,
    split: Split,
    workdir: str | Path,
    path: str | Path,
    steps: Sequence[int] = STEPS,
    examples: int | None = EXAMPLES,
) -> None:
    """Measures a network and writes what was found as one HTML file that needs no other.

    Args:
      config: all settings of the run.
      net: the network.
      variables: `{"params": ..., "batch_stats": ...}`.
      dataset: normalisation and kind of input.
      split: examples and labels to measure on.
      workdir: the run's folder, for its `metrics.jsonl`; without that file the training curves are left out.
      path: the file to write, whole or not at all.
      steps: numbers of time steps to compare, where the input is constant in time.
      examples: measure on at most so many examples of the split; None: on all.
    """
    neuron = configuration.neuron_of(config)
    part = first_examples(split, examples)
    usual = measure(config, net, variables, dataset, part)
    compared = [] if dataset.temporal else [measure(config, net, variables, dataset, part, t) for t in steps]

    few = first_examples(split, FOLLOWED)
    images = prepare_images(jnp.asarray(np.asarray(few.images[np.arange(len(few.labels))])), dataset)
    curves, radius = _dynamics(config, net, variables, images)
    one = images[:, :1] if dataset.temporal else images[:1]
    spikes = raster(net, variables, one, neuron, usual.num_steps)

    height, width, channels = part.images.shape[-3:]
    links = synapses(net, (height, width, channels))
    body = [
        _heading(config, net, variables, dataset, part, split, usual, radius),
        _training_curves(Path(workdir), config, dataset),
        "<div class=pair><div><h2>Confusion matrix</h2>",
        _image(figures.confusion(usual.confusion), "confusion matrix"),
        "</div><div><h2>Firing rates</h2>",
        f"<p class=quiet>True spike counts over all {usual.num_steps} steps, mean over neurons and examples.</p>",
        _image(figures.firing_rates(usual.firing_rates), "firing rate of every layer"),
        "</div></div><h2>Convergence</h2>",
        "<p>Left, how much the firing rates move in a step: averages over t steps move by about 1/t whatever they "
        "tend to. Right, how far they are from the fixed point of the equivalent map, which is what counts.</p>",
        _image(figures.convergence(curves), "convergence of the rates"),
        f"<h2>Spikes of one example</h2><p class=quiet>Class {int(few.labels[0])}.</p>",
        _image(figures.raster(spikes), "raster of spikes"),
        _latency(compared),
        _energy(usual, dense_cost(links, config.forward.max_steps), config.forward.max_steps),
        f"<h2>Settings</h2><details><summary>all settings</summary><pre>{_escape(_settings(config))}</pre></details>",
    ]
    title = f"{config.name}: report"
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_escape(title)}</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_atomically(Path(path), page.encode())


def _dynamics(
    config: ml_collections.ConfigDict, net: MPIS, variables: dict[str, Any], images: jax.Array
) -> tuple[Curves, np.ndarray]:
    """Convergence curves, and the spectral radius at the solved equilibrium, of a few examples."""
    neuron, transition = configuration.neuron_of(config), model.transition_of(net)

    @jax.jit
    def follow(variables: dict[str, Any], images: jax.Array) -> Any:
        x: Any = net.apply(variables, images, False, method="encode")
        curves = convergence(
            transition,
            variables,
            x,
            net.initial_rates(images),
            neuron=neuron,
            num_steps=CONVERGENCE_STEPS,
            time_axis=0 if net.temporal else None,
        )
        solved = model.apply(net, variables, images, neuron=neuron, forward=configuration.solved_of(config))
        mean_x = weighted_mean_frame(x, neuron.leak) if net.temporal else x
        radius = spectral_radius(
            lambda r: transition(variables, r, mean_x, RateReading(neuron)),
            solved.equilibrium.rates,
            jax.random.key(0),
        )
        return curves, radius

    curves, radius = follow(variables, images)
    return curves, np.asarray(radius)


def _heading(
    config: ml_collections.ConfigDict,
    net: MPIS,
    variables: dict[str, Any],
    dataset: Any,
    part: Split,
    split: Split,
    usual: Measurement,
    radius: np.ndarray,
) -> str:
    device = jax.devices()[0]
    number, whole = len(part.labels), len(split.labels)
    measured = f"all {whole:,}" if number == whole else f"the first {number:,} of {whole:,}"
    facts = [
        ("data", dataset.source),
        ("network", f"{net.num_streams} streams, {model.parameter_count(variables):,} parameters"),
        ("method", config.train.method),
        ("measured on", f"{measured} examples, T = {usual.num_steps}"),
        ("accuracy, as trained", f"{100 * usual.accuracy:.2f}%"),
        ("accuracy, spikes alone", f"{100 * usual.accuracy_spikes:.2f}%"),
        ("relative residual", ", ".join(f"{k} {v:.3g}" for k, v in usual.residual.items())),
        (
            "spectral radius of the Jacobian",
            f"{np.median(radius):.3f} in the median, {radius.max():.3f} at most, of {len(radius)} examples",
        ),
        (
            "machine",
            f"{device.device_kind} ({len(jax.devices())}), {platform.machine()}, JAX {jax.__version__}",
        ),
    ]
    rows = "".join(f"<tr><td class=quiet>{_escape(k)}</td><td>{_escape(v)}</td></tr>" for k, v in facts)
    warning = warn_near_one(radius)
    note = f"<p class=warning>{_escape(warning)}</p>" if warning else ""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"<h1>{_escape(config.name)}</h1><p class=quiet>{date}</p><div class=scroll><table>{rows}</table></div>{note}"


def _training_curves(workdir: Path, config: ml_collections.ConfigDict, dataset: Any) -> str:
    source = workdir / "metrics.jsonl"
    if not source.is_file():
        return ""
    rows = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "curves.png"
        steps_per_epoch = len(dataset.train.labels) // config.train.batch_size
        save_curves(rows, image, config.name, steps_per_epoch)
        uri = figures.uri_of(image.read_bytes())
    return f"<h2>Training</h2><img alt='training curves' src='{uri}'>"


def _latency(measurements: list[Measurement]) -> str:
    if not measurements:
        return ""
    rows = [
        (
            str(m.num_steps),
            f"{100 * m.accuracy:.2f}%",
            f"{100 * m.accuracy_spikes:.2f}%",
            f"{max(m.residual.values()):.3f}",
            f"{sum(m.cost.synops.values()) / 1e6:.3f}",
            f"{m.cost.compute_uj:,.1f}",
            f"{m.cost.memory_uj:,.0f}",
        )
        for m in measurements
    ]
    header = ("T", "as trained", "spikes alone", "residual", "million SynOps", "arithmetic, µJ", "memory, µJ")
    drawn = _image(figures.against_steps(measurements), "accuracy against time steps and synaptic operations")
    return f"<h2>Accuracy against time steps and work</h2>{drawn}{_table(header, rows, 0)}"


def _energy(measurement: Measurement, dense: Cost, evaluations: int) -> str:
    c = measurement.cost
    layers = [(name, f"{value / 1e6:.3f}", "") for name, value in c.synops.items()]
    layers += [(name, "", f"{value / 1e6:.3f}") for name, value in c.macs.items()]
    layers.append(("sum", f"{sum(c.synops.values()) / 1e6:.3f}", f"{sum(c.macs.values()) / 1e6:.3f}"))
    table = _table(("layer", "million SynOps", "million MACs"), layers, 1)
    other = f"{c.additions / 1e6:.3f} million additions of currents and {c.updates / 1e6:.3f} million neuron updates"
    return (
        f"<h2>Operations and energy of a sample, T = {measurement.num_steps}</h2>{table}"
        f"<p>Besides, {other}. In all an estimated {c.compute_uj:,.1f} µJ of arithmetic and {c.memory_uj:,.0f} µJ of "
        f"memory traffic. The same network solved as rates by {evaluations} dense evaluations: "
        f"{dense.compute_uj:,.1f} and {dense.memory_uj:,.0f} µJ.</p>"
        f"<p class=quiet>An estimate, not a measurement. {_escape(CONSTANTS)}</p>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], first_number: int) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [" class=n" if i >= first_number else "" for i in range(len(cells))]
        return "".join(f"<{tag}{k}>{_escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{line('th', header)}</tr>{body}</table></div>"


def _image(figure: Any, description: str) -> str:
    return f"<img alt='{_escape(description)}' src='{figures.as_uri(figure)}'>"


def _settings(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
