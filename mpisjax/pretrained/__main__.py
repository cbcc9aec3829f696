"""Makes a pretrained network from a run's folder.

    python -m mpisjax.pretrained --workdir runs/digits --name digits

The training command is read off the run's config; give --command where it took more than one.
"""

from __future__ import annotations

import argparse

from mpisjax import cli
from mpisjax.pretrained import FOLDER


def main() -> None:
    """Parses the command line and writes the two files."""
    parser = argparse.ArgumentParser(prog="python -m mpisjax.pretrained", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--name", required=True, help="what load_pretrained is to call it")
    parser.add_argument("--folder", default=str(FOLDER), help="where to write; the package by default")
    parser.add_argument("--data_dir", help="folder with the original files, if not the run's")
    for name, what in (
        ("command", "how it was trained, if not by one train.py"),
        ("commit", "of the code that trained it, if not the current one"),
        ("machine", "that trained it, if not this one"),
        ("date", "of the training, YYYY-MM-DD, if not today"),
    ):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--note", default="", help="anything else worth knowing")
    given = parser.parse_args()
    with cli.sentences():
        from pathlib import Path

        from mpisjax.pretrained import making
        from mpisjax.training.run import config_of

        config = config_of(Path(given.workdir))
        if given.data_dir is not None:
            config.data.dir = given.data_dir
        trained = making.of_run(given.workdir, config)
        path = making.save(
            trained, given.name, given.folder, command=given.command, commit=given.commit, machine=given.machine,
            date=given.date, note=given.note,
        )  # fmt: skip
        print(f"{path}: {path.stat().st_size:,} bytes; its card is {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
