"""The program `mpisjax` and its commands."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("mpisjax.cli.train", "trains a network, or goes on with a run"),
    "evaluate": ("mpisjax.cli.evaluate", "measures a trained network"),
    "predict": ("mpisjax.cli.predict", "names the class of each image file"),
    "demo": ("mpisjax.cli.demo", "classifies one image file and draws the spikes"),
    "report": ("mpisjax.cli.report", "writes an HTML page about a trained network"),
    "export": ("mpisjax.export.__main__", "writes a trained network for other programs"),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names, and exits.

    Args:
        arguments: The command line without the program's name.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name == "--version":
        print(f"mpisjax {importlib.metadata.version('mpisjax')}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: there is no command {name!r}{hint}; --help lists the commands", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(COMMANDS[name][0]).main(rest)
    sys.exit(0)


def help_text() -> str:
    """What `mpisjax --help` prints."""
    commands = "\n".join(f"  {name:9} {what}" for name, (_, what) in COMMANDS.items())
    return f"""usage: mpisjax COMMAND [flags]

Trains and uses spiking networks at their equilibrium (MPIS-SNNs).

commands:
{commands}

mpisjax COMMAND --help lists a command's flags."""
