"""Writes a network as two files: its weights, and its card. `mpisjax.weights` reads them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from mpisjax import weights
from mpisjax.errors import UserError
from mpisjax.paths import expand
from mpisjax.storage.run_folder import write_atomically

# Of a card, beside what is of the file.
KEPT = ("inputs", "validation", "test", "early_exit", "data", "training", "familiar")


def write(variables: dict[str, Any], card: dict[str, Any], path: str | Path, note: str = "") -> Path:
    """Writes PATH.safetensors and PATH.json; a file that exists is left as it is.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.
        card: How the network was made and what it reaches, with its `config`.
        path: A name in a folder, with or without .safetensors; the folder is made if it is missing.
        note: Anything worth knowing, for the card.

    Returns:
        The path of the weights.

    Raises:
        UserError: The name is taken, or the folder cannot be written.
    """
    name = expand(path).removesuffix(".safetensors")
    path, beside = Path(f"{name}.safetensors"), Path(f"{name}.json")
    for taken in (path, beside):
        if taken.exists():
            raise UserError(f"{taken} exists; choose another name or another folder")
    data = weights.to_bytes(variables)
    whole = {
        "name": Path(name).name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        **{key: card[key] for key in KEPT if key in card},
        "config": without_folders(card["config"]),
        **({"note": note} if note else {}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        write_atomically(beside, (json.dumps(whole, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name a folder you may write to") from error
    return path


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Plain settings without the folders of whoever trained with them."""
    origin = config["train"]["init_from"]
    if os.path.isabs(origin) or "://" in origin:
        origin = f"runs/{Path(origin).name}"
    return {
        **config,
        "data": {**config["data"], "dir": "", "cache_dir": ""},
        "train": {**config["train"], "init_from": origin},
    }
