"""Names the class of each image file with a trained network.

    mpisjax predict photos --model runs/mine --out answers.csv
    mpisjax predict a.png b.png --model digits
    mpisjax predict photos --model digits --confidence 0.9

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
from typing import Any, NamedTuple

import numpy as np

from mpisjax import cli, pretrained
from mpisjax.cli.arguments import Parser, local_path, path, probability, whole_number
from mpisjax.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
COLUMNS = ("file", "class", "confidence", "steps", "spikes", "novelty", "note")
UNLIKE = "unlike the training data"


class Row(NamedTuple):
    """A row of the table; what is not known is empty.

    Attributes:
        file: The file.
        name: Its class.
        confidence: The probability of that class.
        steps: Time steps used.
        spikes: Spikes in them.
        novelty: How unlike the training data it is.
        note: Why it has no class, or is not to be trusted.
    """

    file: str
    name: str
    confidence: str
    steps: str
    spikes: str
    novelty: str
    note: str


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mpisjax predict", __doc__)
    parser.add_argument("files", nargs="+", type=local_path, metavar="FILE", help="image files, or folders of them")
    parser.add_argument(
        "--model",
        required=True,
        type=path,
        help=f"a run's folder, a saved network, or a packaged one: {', '.join(pretrained.available())}",
    )
    parser.add_argument("--out", type=local_path, help="CSV file for the table; standard output by default")
    parser.add_argument("--num_steps", type=whole_number(1), help="time steps; as trained by default")
    parser.add_argument(
        "--confidence",
        type=probability,
        help="stop at the first time step that is this sure; all steps by default",
    )
    parser.add_argument("--data_dir", type=path, help="folder with a run's original files, if they have moved")
    cli.add_trust_argument(parser)
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

    if given.out is not None and not given.out.absolute().parent.is_dir():
        raise UserError(f"--out {given.out} lies in no folder; make the folder or name another file")
    files = find_images(given.files)
    cores.prepare(all_cores=False)
    devices.compilation_cache()
    trained = pretrained.find(given.model, given.data_dir, given.trust)
    rows = name_classes(trained, files, given.num_steps, given.confidence)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    if given.out is None:
        print(text.getvalue(), end="")
    else:
        write_atomically(given.out, text.getvalue().encode())
    named = [row for row in rows if row.name]
    strange = sum(row.note == UNLIKE for row in named)
    parts = [f"{len(named)} of {len(rows)} files have a class"]
    parts += (
        [f"{strange} of them {'is' if strange == 1 else 'are'} unlike the training data of {trained.name}"]
        if strange
        else []
    )
    parts += [f"see {given.out}"] if given.out is not None else []
    print("; ".join(parts), file=sys.stderr)
    if not named:
        raise UserError(f"no file could be named; the first: {rows[0].note}")


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
    trained: Any, files: Sequence[Path], num_steps: int | None = None, confidence: float | None = None
) -> list[Row]:
    """A row for each file.

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
        raise UserError(f"{trained.name} reads event frames, not image files; choose another --model")
    images: list[np.ndarray] = []
    notes: list[str] = []
    for file in files:
        try:
            images.append(read_image(file, trained.inputs, fit=trained.config.data.fit)[0])
            notes.append("")
        except UserError as error:
            notes.append(str(error))
    batch = np.stack(images) if images else np.zeros((0, *trained.inputs.shape), np.uint8)
    found = trained.predict(batch, num_steps=num_steps, confidence=confidence)
    rows, number = [], 0
    for file, note in zip(files, notes, strict=True):
        if note:
            rows.append(Row(str(file), "", "", "", "", "", note))
            continue
        novelty = float(found.novelty[number])
        rows.append(
            Row(
                str(file),
                found.classes[number],
                f"{found.confidence[number]:.4f}",
                str(found.steps[number]),
                str(found.spikes[number]),
                "" if np.isnan(novelty) else f"{novelty:.3f}",
                UNLIKE if novelty > 1 else "",
            )
        )
        number += 1
    return rows
