"""What the flags --workdir, --pretrained, --split and --num_steps of a command name."""

from __future__ import annotations

from mpisjax.errors import UserError


def config_of_run(given, config_file: str | None):
    """The config that the run was trained with."""
    if config_file is not None:
        raise UserError(
            "this command takes the config from --workdir or --pretrained; leave --config out, or override single "
            "settings"
        )
    if given.pretrained is not None:
        import mpisjax

        return mpisjax.load_pretrained(given.pretrained).config
    from mpisjax.storage.run_folder import path_of
    from mpisjax.training.run import saved_config

    named_here = [override.partition("=")[2] for override in given.overrides]
    return saved_config(path_of(given.workdir), given.trust or named_here)


def restored(given, config):
    """What --workdir or --pretrained names: a name for it, the parts, the state, and the step it was saved at."""
    from mpisjax.storage.run_folder import path_of
    from mpisjax.training.run import restore_best

    if given.pretrained is None:
        return given.workdir, *restore_best(path_of(given.workdir), config)
    from mpisjax.pretrained import restore

    return f"pretrained {given.pretrained}", *restore(given.pretrained, config)


def split_of(given, parts):
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
