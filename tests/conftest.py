"""For every test: the CPU, unless JAX_PLATFORMS asks for another platform, and no deprecated calls of our own."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "optimized: compiled as users' programs are, not quickly")
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:mpisjax(\..*)?")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
