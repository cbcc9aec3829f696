"""The network that a command line names, by the same flags in every program, and the split to measure it on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpisjax.cli.arguments import Parser, path, whole_numbers
from mpisjax.errors import UserError

if TYPE_CHECKING:
    from mpisjax.pretrained import Trained


def add_network_arguments(parser: Parser, *, workdir: str | None = None, pretrained: str | None = None) -> None:
    """The flags that name a network: one of the first two is required where neither has a default."""
    from mpisjax.pretrained import available

    source = parser.add_mutually_exclusive_group(required=workdir is None and pretrained is None)
    source.add_argument("--workdir", type=path, default=workdir, help="folder of a run, or a saved network")
    packaged = f"a network that comes with the package: {', '.join(available())}"
    source.add_argument("--pretrained", default=pretrained, help=packaged)
    add_stored_arguments(parser)


def add_stored_arguments(parser: Parser) -> None:
    """The flags of programs that read what somebody may have stored elsewhere, or somebody else."""
    if not parser.with_config:  # else it is --config.data.dir
        parser.add_argument("--data_dir", type=path, help="folder with a run's original files, if they have moved")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import the module of a network or an optimiser that only the stored file names: its code runs",
    )


def add_split_arguments(parser: Parser) -> None:
    """The flags that say what a network is measured on, and for how long."""
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what to measure on")
    steps = "numbers of time steps to compare, such as 1,2,5,10,30"
    parser.add_argument("--num_steps", type=whole_numbers(1), default=[], help=steps)


def network(given: Any) -> Trained:
    """The network that --workdir names, else --pretrained."""
    from mpisjax.pretrained import load, load_pretrained

    if given.workdir is not None:
        trained = load(given.workdir, given.data_dir, trust=given.trust)
    else:
        trained = load_pretrained(given.pretrained)
    if given.data_dir is not None:
        trained.config.data.dir = given.data_dir
    return trained


def config_of_run(given: Any, config_file: str | None) -> Any:
    """The config that the network was trained with. The flags get the network as `network`, None of a run."""
    from mpisjax.pretrained import load, load_pretrained, saved_at
    from mpisjax.storage.run_folder import path_of
    from mpisjax.training.run import saved_config

    if config_file is not None:
        raise UserError(
            "this command takes the config from --workdir or --pretrained; leave --config out, or override single "
            "settings"
        )
    given.network = None
    if given.pretrained is not None:
        given.network = load_pretrained(given.pretrained)
    elif saved_at(given.workdir) is not None:
        given.network = load(given.workdir, trust=given.trust)
    if given.network is not None:
        return given.network.config
    named_here = [override.partition("=")[2] for override in given.overrides]
    return saved_config(path_of(given.workdir), given.trust or named_here)


def restored(given: Any, config: Any) -> tuple[str, Any, Any, int]:
    """The network and its data: a name for it, the parts, the state, and the step it was saved at."""
    from mpisjax.pretrained import restore
    from mpisjax.storage.run_folder import path_of
    from mpisjax.training.run import restore_best

    if given.network is None:
        return given.workdir, *restore_best(path_of(given.workdir), config)
    origin = given.workdir if given.pretrained is None else f"pretrained {given.pretrained}"
    return origin, *restore(given.network, config)


def split_of(given: Any, parts: Any) -> Any:
    """The split that --split names.

    Raises:
        UserError: It is empty, or frames leave no choice of --num_steps.
    """
    split = getattr(parts.dataset, given.split)
    if not len(split.labels):
        raise UserError(f"the run holds out no {given.split} examples; choose --split test")
    if given.num_steps and parts.dataset.temporal:
        raise UserError("--num_steps needs a constant input; an event set takes as many steps as data.num_frames")
    return split


def check_folder(flag: str, file: str | Path) -> None:
    """Refuses a file to write whose folder is missing."""
    if not Path(file).absolute().parent.is_dir():
        raise UserError(f"{flag} {file} lies in no folder; make the folder or name another file")
