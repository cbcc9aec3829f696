"""Table 2: the firing rate of every layer, counted over all time steps."""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.nets import Net
from experiments.paper import reported
from experiments.scales import Scale
from experiments.study import Study, described
from experiments.tables import MISSING, across_seeds, of_seeds, table

TITLE = "Table 2: firing rates"


def nets(scale: Scale) -> list[Net]:
    """What has to be trained."""
    return list(scale.firing)


def run(study: Study) -> dict[str, Any]:
    """Counts the spikes of trained networks; gives the rows."""
    rows = study.rows("table2", nets=[described(net) for net in study.scale.firing])
    for net in study.scale.firing:
        for seed in study.scale.seeds:
            settings = study.settings(net, seed, what="spikes", examples=study.scale.examples, steps=net.steps)
            rows.row(f"{net.name} seed {seed}", settings, partial(count, study, net, seed))
    return rows.finish()


def count(study: Study, net: Net, seed: int) -> dict[str, Any]:
    """True spike counts, and the work they stand for."""
    from mpisjax.analysis.measure import first_examples, measure

    trained = study.trained(net, seed)
    split = first_examples(trained.dataset.test, study.scale.examples)
    measured, cost = measure(
        trained.network,
        trained.variables,
        trained.dataset,
        split,
        neuron=trained.neuron,
        num_steps=net.steps,
    )
    assert cost is not None  # the networks are MPIS
    found = measured.evaluation
    return {
        "firing_rates": found.firing_rates,
        "synops": sum(cost.synops.values()),
        "macs": sum(cost.macs.values()),
        "compute_uj": cost.compute_uj,
        "memory_uj": cost.memory_uj,
        "num_examples": found.num_examples,
        "num_steps": round(found.num_steps),
    }


def render(content: dict[str, Any]) -> str:
    """A row a layer, a column a network."""
    from mpisjax.nn.operations import CONSTANTS

    runs = [(net, of_seeds(content, net["name"])) for net in content["nets"]]
    layers = dict.fromkeys(layer for _, found in runs for r in found for layer in r["firing_rates"])
    header = ["layer", "paper", *(f"ours, {net['data']}, T = {net['steps']}" for net, _ in runs)]
    unknown = reported.NO_ROW if all(net["data"] == "digits" for net, _ in runs) else reported.UNKNOWN
    lines = []
    for layer in layers:
        values = [across_seeds([r["firing_rates"][layer] for r in found], 4) if found else MISSING for _, found in runs]
        lines.append([layer, unknown, *values])
    for what, key, factor, digits in (
        ("million SynOps a sample", "synops", 1e-6, 3),
        ("million MACs a sample", "macs", 1e-6, 3),
        ("estimated energy of arithmetic, µJ", "compute_uj", 1.0, 1),
        ("estimated energy of memory traffic, µJ", "memory_uj", 1.0, 0),
    ):
        values = [across_seeds([r[key] for r in found], digits, factor) if found else MISSING for _, found in runs]
        lines.append([what, reported.NO_ROW, *values])
    counted = sorted({r["num_examples"] for _, found in runs for r in found})
    number = ", ".join(f"{n:,}" for n in counted) or "no"
    return "\n\n".join(
        [
            table(header, lines),
            "Firing rates are spikes a neuron and time step: all spikes of the T steps are counted, and the mean is "
            f"over neurons and {number} test examples. The paper's Table 2 has {reported.FIRING_RATES}. Which of its "
            "layers is which of ours is not known here. Its public code does not add the spikes of the steps up, which "
            f"would make its figures smaller. Energies are estimates, not measurements. {CONSTANTS}",
        ]
    )


def draw(content: dict[str, Any]) -> dict[str, Any]:
    """Bars by layer, for the first network."""
    from mpisjax.analysis.figures import firing_rates

    figures: dict[str, Any] = {}
    for net in content["nets"]:
        found = of_seeds(content, net["name"])
        if found:
            rates = {k: sum(r["firing_rates"][k] for r in found) / len(found) for k in found[0]["firing_rates"]}
            figures[f"firing_rates_t{net['steps']}"] = firing_rates(rates)
    return figures
