"""Puts this folder on the path, so that its tests can import `tiny` however pytest imports them."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The package's log, whatever the tests before have done to its logger."""
    logger = logging.getLogger("mpisjax")
    propagate, level = logger.propagate, logger.level
    logger.propagate = True
    caplog.set_level(logging.INFO, logger="mpisjax")
    yield caplog
    logger.propagate = propagate
    logger.setLevel(level)
