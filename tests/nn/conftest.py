"""Compiling is most of what these tests cost: XLA is asked to optimise little, unless a test says otherwise."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_quickly(request):
    little = not request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", little)
    yield
    jax.config.update("jax_disable_most_optimizations", False)  # the default
