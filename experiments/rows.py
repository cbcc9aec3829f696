"""The finished rows of an experiment in a JSON file. A row is computed again only if its settings changed."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from mpisjax.storage.preemption import Preempted, Stopper
from mpisjax.storage.run_folder import write_atomically

_log = logging.getLogger("experiments")


class Rows:
    """The rows of one file.

    Args:
        path: The file; it and its folder are made when the first row is finished.
        header: What the file says beside its rows.
        stopper: Says whether a signal asked to stop; a row is saved before it is obeyed.

    Attributes:
        seeds: Those of the header, and those that the file has from earlier commands.
    """

    def __init__(self, path: Path, header: dict[str, Any], stopper: Stopper) -> None:
        self._path, self._stopper, self._asked = path, stopper, dict[str, None]()
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.content = {**header, "rows": found.get("rows", {})}
        self.seeds: list[int] = sorted({*found.get("seeds", ()), *header["seeds"]})

    def row(self, key: str, settings: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row `key`, computed and saved unless a row of the same settings is there.

        Args:
            key: The row's name.
            settings: Everything that the result depends on, as JSON can hold it.
            compute: Gives the result, as JSON can hold it.
        """
        digest = _digest(settings)
        found = self.content["rows"].get(key)
        self._asked[key] = None
        if found is None or found["settings"] != digest:
            _log.info("%s: %s", self.content["experiment"], key)
            result = compute()
            date = datetime.date.today().isoformat()
            found = {"settings": digest, "date": date, "machine": machine(), "result": result}
            with self._stopper.deferred():
                self.content["rows"][key] = found
                self._save()
            if self._stopper.requested is not None:
                raise Preempted(self._stopper.requested)
        return found["result"]

    def keep(self, key: str, seed: int, settings: Any) -> None:
        """Keeps the row of a seed that this command does not ask for, if it was made with the same settings."""
        found = self.content["rows"].get(key)
        if found is not None and found["settings"] == _digest(settings):
            self._asked[key] = None
            self.content["seeds"] = sorted({*self.content["seeds"], seed})

    def finish(self) -> dict[str, Any]:
        """Drops the rows that this run neither asked for nor kept, saves, and returns the content of the file."""
        self.content["rows"] = {k: self.content["rows"][k] for k in self._asked}
        seeds = ",".join(map(str, self.content["seeds"]))
        self.content["command"] = re.sub(r"(?<= --seeds )[\d,]+", seeds, self.content.get("command", ""))
        with self._stopper.deferred():
            self._save()
        return self.content

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, (json.dumps(self.content, indent=1) + "\n").encode())


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
