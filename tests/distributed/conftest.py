"""Compiling is most of what these tests cost: XLA is asked to optimise little."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def compile_little():
    """For the module's fixtures too, which come before any test's own."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def still_compile_little(compile_quickly, compile_little):
    """The folder above sets it anew for every test."""
    jax.config.update("jax_disable_most_optimizations", True)
