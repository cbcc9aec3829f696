"""For every test: the CPU, unless JAX_PLATFORMS asks for another platform, no deprecated calls of our own, no
network.
"""

import atexit
import gc
import importlib.metadata
import logging
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Fused loops through MLIR run about a quarter faster and compile three times as long; a test compiles more than
    # it runs. Programs that tests start inherit it. Other versions do not know the flag and would not start. CI runs
    # what is marked `optimized` once more with XLA_FLAGS empty, as users' programs are compiled.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiles serves all, in every worker and program
    compiled = tempfile.mkdtemp(prefix="mpisjax-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))  # with a limit, writers lock out readers
    os.environ.setdefault("JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY", "true")

import subprocess
import sys
from pathlib import Path

import jax
import pytest

# Tracing makes many objects that live on. Looking for garbage among them took a tenth of the time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

ROOT = Path(__file__).parents[1]
HERE = ("127.", "::1", "localhost", "0.0.0.0")


def stay_at_home(event: str, arguments: tuple) -> None:
    """An audit hook: no test may reach for another machine, nor ask for its address."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        place = arguments[1]
        host = place[0] if isinstance(place, tuple) else None  # a Unix socket's place is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode()
    if host and not host.startswith(HERE):
        raise RuntimeError(f"{event}: a test reaches for {host}")


sys.addaudithook(stay_at_home)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "optimized: compiled as users' programs are (the default)")
    config.addinivalue_line("markers", "unoptimized: compiled quickly, since compiling is most of what it costs")
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:mpisjax(\..*)?")


@pytest.fixture(scope="session")
def python():
    """Runs Python in a process of its own, as a user would type it: `python(*arguments, cwd=ROOT, **environment)`."""

    def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
        )

    return run


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


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_heap():
    """For `jax.checking_leaks`, which collects garbage at each trace: what other tests have left is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _optimize_little(node: pytest.Item | pytest.Collector) -> None:
    """Sets how XLA compiles from the nearest of a test's, its class's and its module's markers."""
    nearest = next((m.name for m in node.iter_markers() if m.name in ("optimized", "unoptimized")), "optimized")
    jax.config.update("jax_disable_most_optimizations", nearest == "unoptimized")


@pytest.fixture(autouse=True, scope="module")
def compile_mode_of_the_module(request):
    """For the fixtures of a module, which are made before those of a test."""
    _optimize_little(request.node)
    yield
    jax.config.update("jax_disable_most_optimizations", False)  # the default


@pytest.fixture(autouse=True)
def compile_mode(request, compile_mode_of_the_module):
    """For one test."""
    _optimize_little(request.node)
