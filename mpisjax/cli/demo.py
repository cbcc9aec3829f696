"""Classifies an image file with a trained spiking network and shows how it came to its answer.

    mpisjax demo digit.png
    mpisjax demo shirt.jpg --pretrained fashion_mnist --num_steps 30 --live
    mpisjax demo photo.png --workdir runs/mine

Prints the three best classes, spikes and steps, says when the image is unlike the training data, and writes a picture
(raster and settling rates) and the same animated: NAME_spikes.png and NAME_spikes.gif in the current folder, or
--out's. The answer is that of the first time step that is sure enough (--confidence). The simulation is drawn to its
end. The digits that it knows are handwritten: of 100 printed ones, in ten fonts, 84 are right, and 15 are said to be
unlike the training data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, local_path, path, probability, whole_number

SHOWN = 3  # classes
CONFIDENCE = 0.9  # where a network's card names none that held-out examples chose


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mpisjax demo", __doc__)
    parser.add_argument("image", type=local_path, help="a PNG or JPEG file")
    named.add_network_arguments(parser, pretrained="digits")
    parser.add_argument("--num_steps", type=whole_number(1), help="time steps; as trained by default")
    parser.add_argument(
        "--confidence",
        type=probability,
        help="answer at the first time step that is this sure; by default as held-out examples chose, or "
        f"{CONFIDENCE}; 1: after all steps",
    )
    parser.add_argument("--out", type=path, help="where to write, less .png and .gif; ./NAME_spikes by default")
    parser.add_argument("--live", action="store_true", help="also play it in the terminal")
    parser.add_argument("--no_gif", dest="gif", action="store_false", help="write the picture alone")
    parser.add_argument("--no_crop", dest="crop", action="store_false", help="scale the image without cropping it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    given = parse(arguments)
    with cli.report_user_errors():
        demonstrate(given)


def demonstrate(given: argparse.Namespace) -> None:
    """Classifies, prints and draws.

    Raises:
        UserError: The image, the network or the output file is not there, or the image is blank.
    """
    from rich.console import Console

    from mpisjax.analysis.anytime import first_sure
    from mpisjax.cpu import cores
    from mpisjax.pretrained.drawing import Drawing, show_live
    from mpisjax.pretrained.images import read_image
    from mpisjax.pretrained.trace import trace
    from mpisjax.training import devices

    out = given.out or f"{given.image.stem}_spikes"
    named.check_folder("--out", out)
    cores.prepare(all_cores=False)
    devices.compilation_cache()
    trained = named.network(given)
    inputs = trained.inputs
    image, done = read_image(given.image, inputs, given.crop, trained.config.data.fit)
    found = trace(trained, image, given.num_steps)
    confidence = given.confidence or trained.card.get("early_exit", {}).get("confidence", CONFIDENCE)
    at = int(first_sure(found.scores.max(-1, keepdims=True), confidence)[0])
    scores, steps = found.scores[at], len(found.scores)
    answer = f"{inputs.classes[int(scores.argmax())]}, {100 * float(scores.max()):.1f}%"

    console = Console(highlight=False, soft_wrap=True)
    if given.live:
        show_live(console, found, inputs)
    console.print(f"image: {given.image}" + (f" ({', '.join(done)})" if done else ""), markup=False)
    for line in _sentences(trained, found, at):
        console.print(line, markup=False)
    novelty = float(trained.predict(image).novelty[0])
    if novelty > 1:
        console.print(
            f"This image is unlike the training data of {trained.name}: {novelty:.1f} times as far from them as 99 of "
            "100 of their kind. Do not trust the answer.",
            style="bold yellow",
        )
    title = f"{trained.name}: {answer}\nafter {at + 1} of {steps} steps, {found.spikes_until(at + 1):,} spikes"
    drawing = Drawing(image, found, inputs, title, at + 1)
    drawing.save_png(Path(f"{out}.png"))
    written = [f"{out}.png"]
    if given.gif:
        drawing.save_gif(Path(f"{out}.gif"))
        written.append(f"{out}.gif")
    console.print(f"written: {', '.join(written)}", markup=False)


def _sentences(trained: Any, found: Any, at: int) -> list[str]:
    """What the network says, a line each."""
    classes, steps = trained.inputs.classes, len(found.scores)

    def best(scores: np.ndarray) -> str:
        order = np.argsort(-scores, kind="stable")[:SHOWN]
        return ", ".join(f"{classes[n]} {100 * float(scores[n]):.1f}%" for n in order)

    def spent(until: int) -> str:
        spikes = found.spikes_until(until)
        rate = spikes / found.num_neurons / until
        return f"{spikes:,} spikes of {found.num_neurons:,} neurons, {rate:.3f} per neuron and step"

    number = int(found.scores[at].argmax())
    lines = [
        f"class: {classes[number]}, confidence {100 * float(found.scores[at][number]):.1f}% after {at + 1} of {steps} "
        "steps",
        f"best classes: {best(found.scores[at])}",
        f"spent: {spent(at + 1)}",
    ]
    if at + 1 < steps:
        lines.append(f"after all {steps} steps: {best(found.scores[-1])}; {spent(steps)}")
    return [*lines, f"by the equivalent path: {best(found.equivalent)}"]
