"""Commands run inside this process: what they set for a whole process is undone."""

import faulthandler
import logging
import sys

import pytest

from mpisjax import cli
from mpisjax.cpu import cores
from mpisjax.training import devices


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No traces of faults, devices as they are, and the package's log on standard error for one test."""
    monkeypatch.setattr(faulthandler, "enable", lambda: None)
    monkeypatch.setattr(cores, "prepare", lambda *given, **named: None)
    monkeypatch.setattr(devices, "compilation_cache", lambda: "")
    logger = logging.getLogger("mpisjax")
    before = (logger.level, logger.propagate, [*logger.handlers])

    def log_to_screen() -> None:
        logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
        logger.setLevel(logging.INFO)

    monkeypatch.setattr(cli, "set_up_log", log_to_screen)
    yield
    logger.level, logger.propagate, logger.handlers = before
