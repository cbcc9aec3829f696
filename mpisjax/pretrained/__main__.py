"""Makes a pretrained network from a run's folder.

    python -m mpisjax.pretrained --workdir runs/digits --name digits --out networks

writes networks/digits.safetensors and networks/digits.json, which `load_pretrained("digits", "networks")`
reads. The training command is found from the run's config; give --command where training took more than one.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpisjax import cli
from mpisjax.cli import named
from mpisjax.cli.arguments import Parser, path
from mpisjax.configuration import config_files

if TYPE_CHECKING:
    from mpisjax.data import DataSet
    from mpisjax.pretrained.trained import Trained


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the two files."""
    parser = Parser("python -m mpisjax.pretrained", __doc__)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--name", required=True, help="what load_pretrained is to call it")
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write to; a name that exists there is refused"
    )
    parser.add_argument("--command", help="how it was trained, if not by one train.py")
    parser.add_argument("--commit", help="of the code that trained it, if not the current one")
    parser.add_argument("--machine", help="that trained it, if not this one")
    parser.add_argument("--date", help="of the training, YYYY-MM-DD, if not today")
    parser.add_argument(
        "--weights", choices=("float32", "float16"), default="float32",
        help="how kernels are stored; float16 halves the file, and the card's test figures are measured with it",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="anything else worth knowing")
    named.add_stored_arguments(parser)
    given = parser.parse_args(argv)
    with cli.report_user_errors():
        from mpisjax.configuration import makers
        from mpisjax.pretrained import save

        trained = save.from_run(given.workdir, given.data_dir, trusted=given.trust)
        dataset = makers.make_dataset(trained.config)
        if given.weights == "float16":
            trained = in_half_precision(trained, dataset)
        written = save.save(
            trained._replace(card={**trained.card, **early_exit(trained, dataset)}),
            Path(given.out) / given.name,
            {
                "command": given.command or training_command(trained.config),
                "commit": given.commit or current_commit(),
                "machine": given.machine or describe_machine(),
                "date": given.date or datetime.now(UTC).date().isoformat(),
            },
            given.note,
        )
        print(f"{written}: {written.stat().st_size:,} bytes; its card is {written.with_suffix('.json').name}")


def in_half_precision(trained: Trained, dataset: DataSet) -> Trained:
    """With kernels rounded to float16, and a card whose test figures are those of what is stored."""
    from mpisjax import weights
    from mpisjax.configuration import makers
    from mpisjax.training import evaluation

    variables = weights.rounded(trained.variables)
    found = makers.make_evaluator(trained.config, trained.net, dataset)(variables, dataset.test)
    test = {"checkpoint_step": trained.card["training"]["steps"], **evaluation.as_json(found)}
    return trained._replace(**variables, card={**trained.card, "test": test})


def early_exit(trained: Trained, dataset: DataSet) -> dict[str, Any]:
    """For the card: the confidence at which the demo stops, and what it gives; nothing without held-out examples."""
    from mpisjax.analysis import anytime

    examples = anytime.held_out_count(dataset)
    if not examples:
        return {}
    found = anytime.on_held_out(
        trained.net, trained.variables, dataset, neuron=trained.neuron, num_steps=trained.forward.num_steps
    )
    kept = ("accuracy", "full_accuracy", "mean_steps", "synops", "full_synops")
    chosen = {"confidence": found.threshold, "split": "validation", "examples": examples}
    return {"early_exit": chosen | {name: getattr(found, name) for name in kept}}


def training_command(config: Any) -> str:
    """The `train.py` command line whose config this is, without the folders of whoever ran it.

    The config file is `configs/<data set>.py`, with the variant that leaves the fewest settings to override.
    """
    from flax.traverse_util import flatten_dict

    from mpisjax.configuration import to_plain
    from mpisjax.pretrained.files import without_folders

    file = config_files.packaged_configs().get(config.data.name)
    if file is None:
        return "train.py with the settings of this card"
    ours = flatten_dict(without_folders(to_plain(config)), sep=".")
    candidates = []
    for variant in ("", *runpy.run_path(str(file)).get("VARIANTS", {})):
        other = config_files.load_config(f"{file}:{variant}" if variant else str(file))
        theirs = flatten_dict(to_plain(other), sep=".")
        changed = {key: value for key, value in ours.items() if theirs.get(key) != value and key != "name"}
        candidates.append((f"configs/{file.name}" + (f":{variant}" if variant else ""), changed))
    name, changed = min(candidates, key=lambda candidate: len(candidate[1]))
    config_flag = [] if name == "configs/digits.py" else ["--config", name]
    texts = {k: str(tuple(v)).replace(" ", "") if isinstance(v, list) else str(v) for k, v in changed.items()}
    return shlex.join(["python", "train.py", *config_flag, *(f"--config.{k}={text}" for k, text in texts.items())])


def current_commit() -> str:
    """The commit of the working tree that Python runs in, "unknown" outside one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def describe_machine() -> str:
    """Processor, cores and JAX's devices, in words."""
    import jax

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = jax.devices()[0]
    return f"{os.cpu_count()}-core {model}; jax {jax.__version__} on {device.platform} ({device.device_kind})"


if __name__ == "__main__":
    main()
