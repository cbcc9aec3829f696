"""Names the class of each image file with a trained network.

    mpisjax predict photos --workdir runs/mine --out answers.csv
    mpisjax predict a.png b.png --pretrained digits
    mpisjax predict photos --pretrained digits --confidence 0.9

Writes a table with a row a file: its class, how sure that is, the time steps and spikes that were used, and how unlike
the training data the file is (above 1: farther from them than 99 of 100 of their kind). A folder is searched for
images, with the folders in it. A file that cannot be read or is blank has no class, and the table says why.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, local_path, probability, whole_number
from mpisjax.errors import UserError

if TYPE_CHECKING:
    from mpisjax.pretrained import Trained

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# A note says why a file has no class, or is not to be trusted; what is not known is empty.
COLUMNS = ("file", "class", "confidence", "steps", "spikes", "novelty", "note")
UNLIKE = "unlike the training data"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mpisjax predict", __doc__)
    parser.add_argument("files", nargs="+", type=local_path, metavar="FILE", help="image files, or folders of them")
    named.add_network_arguments(parser)
    parser.add_argument("--out", type=local_path, help="CSV file for the table; standard output by default")
    parser.add_argument("--num_steps", type=whole_number(1), help="time steps; as trained by default")
    parser.add_argument(
        "--confidence",
        type=probability,
        help="stop at the first time step that is this sure; all steps by default",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    given = parse(arguments)
    with cli.report_user_errors():
        _main(given)


def _main(given: argparse.Namespace) -> None:
    from mpisjax.cpu import cores
    from mpisjax.storage.run_folder import write_atomically
    from mpisjax.training import devices

    if given.out is not None:
        named.check_folder("--out", given.out)
    files = find_images(given.files)
    cores.prepare(all_cores=False)
    devices.compilation_cache()
    trained = named.network(given)
    rows = name_classes(trained, files, given.num_steps, given.confidence)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if given.out is None:
        print(text.getvalue(), end="")
    else:
        write_atomically(given.out, text.getvalue().encode())
    with_class = sum("class" in row for row in rows)
    strange = sum(row["note"] == UNLIKE for row in rows)
    parts = [f"{with_class} of {len(rows)} files have a class"]
    if strange:
        parts.append(f"{strange} of them {'is' if strange == 1 else 'are'} {UNLIKE} of {trained.name}")
    if given.out is not None:
        parts.append(f"see {given.out}")
    print("; ".join(parts), file=sys.stderr)
    if not with_class:
        raise UserError(f"no file could be named; the first: {rows[0]['note']}")


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files that are named, and the images in the folders that are; hidden ones are left out.

    Raises:
        UserError: A name is neither a file nor a folder, or a folder has no image.
    """
    found: list[Path] = []
    for one in given:
        if one.is_dir():
            inside = [
                file
                for file in sorted(one.rglob("*"))
                if file.suffix.lower() in ENDINGS
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(one).parts)
            ]
            if not inside:
                raise UserError(f"{one} holds no image; name files, or a folder with {', '.join(ENDINGS)}")
            found += inside
        elif one.exists():
            found.append(one)
        else:
            raise UserError(f"there is no file and no folder {one}; name image files, or a folder of them")
    return found


def name_classes(
    trained: Trained, files: Sequence[Path], num_steps: int | None, confidence: float | None
) -> list[dict[str, str]]:
    """A row for each file, by `COLUMNS`.

    Args:
        trained: The network.
        files: Image files.
        num_steps: See `Trained.predict`.
        confidence: See `Trained.predict`.

    Raises:
        UserError: The network reads frames, or cannot be asked like this.
    """
    from mpisjax.pretrained.images import read_image

    if trained.inputs.temporal:
        raise UserError(f"{trained.name} reads event frames, not image files; choose another network")
    rows, readable, images = [{"file": str(file)} for file in files], [], []
    for file, row in zip(files, rows, strict=True):
        try:
            images.append(read_image(file, trained.inputs, fit=trained.config.data.fit)[0])
            readable.append(row)
        except UserError as error:
            row["note"] = str(error)
    found = trained.predict(
        np.array(images, np.uint8).reshape(-1, *trained.inputs.shape), num_steps=num_steps, confidence=confidence
    )
    for number, row in enumerate(readable):
        novelty = float(found.novelty[number])
        row |= {
            "class": found.classes[number],
            "confidence": f"{found.confidence[number]:.4f}",
            "steps": str(found.steps[number]),
            "spikes": str(found.spikes[number]),
            "novelty": "" if np.isnan(novelty) else f"{novelty:.3f}",
            "note": UNLIKE if novelty > 1 else "",
        }
    return rows
