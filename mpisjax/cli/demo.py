"""Classifies an image file with a trained spiking network and shows how it came to its answer.

    mpisjax demo digit.png
    mpisjax demo shirt.jpg --pretrained fashion_mnist --num_steps 30 --live

Prints class, confidence, spikes and steps, and writes a picture (raster and settling rates) and the same
animated: NAME_spikes.png and NAME_spikes.gif in the current folder, or --out's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpisjax import cli, pretrained
from mpisjax.cli.arguments import Parser, local_path, path, whole_number
from mpisjax.errors import UserError


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mpisjax demo", __doc__)
    parser.add_argument("image", type=local_path, help="a PNG or JPEG file")
    parser.add_argument("--pretrained", default="digits", help=f"one of {', '.join(pretrained.available())}")
    parser.add_argument("--num_steps", type=whole_number(1), help="time steps; as trained by default")
    parser.add_argument(
        "--out", type=path, help="where to write, less .png and .gif; ./NAME_spikes by default"
    )
    parser.add_argument("--live", action="store_true", help="also play it in the terminal")
    parser.add_argument("--no_gif", dest="gif", action="store_false", help="write the picture alone")
    parser.add_argument(
        "--no_crop", dest="crop", action="store_false", help="scale the image without cropping it"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    given = parse(arguments)
    with cli.report_user_errors():
        demonstrate(given)


def demonstrate(given: argparse.Namespace) -> None:
    """Classifies, prints and draws.

    Raises:
        UserError: The image, the network or the output file is not there.
    """
    from rich.console import Console

    from mpisjax.cpu import cores
    from mpisjax.pretrained.drawing import Drawing, show_live
    from mpisjax.pretrained.images import read_image
    from mpisjax.pretrained.trace import trace
    from mpisjax.training import devices

    out = given.out or f"{given.image.stem}_spikes"
    if not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out} lies in no folder; make the folder or name another file")
    cores.prepare(all_cores=False)
    devices.compilation_cache()
    trained = pretrained.load_pretrained(given.pretrained)
    inputs = trained.inputs
    image, done = read_image(given.image, inputs, given.crop)
    found = trace(trained, image, given.num_steps)

    console, steps = Console(highlight=False, soft_wrap=True), len(found.scores)
    best, sure = int(found.scores[-1].argmax()), float(found.scores[-1].max())
    if given.live:
        show_live(console, found, inputs)
    console.print(f"image: {given.image}" + (f" ({', '.join(done)})" if done else ""), markup=False)
    console.print(f"class: [bold]{inputs.classes[best]}[/bold], confidence {100 * sure:.1f}%")
    other = int(found.equivalent.argmax())
    console.print(
        f"by the equivalent path: {inputs.classes[other]}, confidence "
        f"{100 * float(found.equivalent.max()):.1f}%"
    )
    console.print(
        f"spikes: {found.num_spikes:,} by {found.num_neurons:,} neurons in {steps} time steps, "
        f"{found.num_spikes / found.num_neurons / steps:.3f} per neuron and step"
    )
    answer = f"{inputs.classes[best]}, {100 * sure:.1f}%"
    title = f"{answer}: {found.num_spikes:,} spikes in {steps} steps ({given.pretrained})"
    drawing = Drawing(image, found, inputs, title)
    drawing.save_png(Path(f"{out}.png"))
    written = [f"{out}.png"]
    if given.gif:
        drawing.save_gif(Path(f"{out}.gif"))
        written.append(f"{out}.gif")
    console.print(f"written: {', '.join(written)}", markup=False)
