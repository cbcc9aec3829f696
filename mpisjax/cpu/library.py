"""Compiles the C++ files of this folder with the machine's own compiler, once, and registers them with XLA.

The library lies in the user's cache. Its name depends on all that went into it: sources, compiler, flags,
jaxlib's interface and the processor's features. XLA's own convolutions serve where there is no compiler, and
where `MPISJAX_CPU=0` is set. Nothing is compiled, and the cache is not touched, before a program for a CPU is
traced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import jax
import jax.ffi

from mpisjax.paths import cache_folder

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-w")
# Target names, and the symbols behind them.
CONVOLVE, KERNEL_GRADIENT, FILTER = "mpisjax_convolve", "mpisjax_kernel_gradient", "mpisjax_filter"
_SYMBOLS = {CONVOLVE: "MpisjaxConvolve", KERNEL_GRADIENT: "MpisjaxKernelGradient", FILTER: "MpisjaxFilter"}
_LIMIT = 300  # seconds for the compiler
# A part of the key of every jit: a program that was traced with it is not used without it.
_wanted = jax.make_user_context(True)
_log = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether programs that are traced now for a CPU use the compiled convolutions."""
    return bool(_wanted.value) and jax.default_backend() == "cpu" and available()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads should share a batch: as many as XLA's pool has, one a core at most."""
    asked = os.environ.get("PJRT_NPROC", "")
    return min(cores(), int(asked)) if asked.isdigit() and int(asked) else cores()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Programs traced within hold XLA's convolutions alone, and run on other machines (`jax.export`)."""
    with _wanted(False):
        yield


@functools.cache
def available() -> bool:
    """Compiles, loads and registers, once a process. Where that fails, the log says why."""
    if os.environ.get("MPISJAX_CPU", "1") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None or platform.system() not in ("Linux", "Darwin"):
        _log.info("no C++ compiler (c++, g++ or clang++): convolutions are XLA's own, about twice as slow")
        return False
    try:
        with _folder() as folder:
            path = _compiled(compiler, folder)
            _refuse_what_others_may_write(folder, path)
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # damaged
                path.unlink()
                library = ctypes.CDLL(str(_compiled(compiler, folder)))
        for target, symbol in _SYMBOLS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "the convolutions for this processor could not be compiled or loaded, and XLA's own take about "
            "twice as long (MPISJAX_CPU=0 silences this): %s",
            told.strip().splitlines()[-1] if told.strip() else type(error).__name__,
        )
        return False
    return True


def _files(endings: tuple[str, ...]) -> dict[str, bytes]:
    """The files of this folder, in the order of their names."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    return {file.name: file.read_bytes() for file in files if file.name.endswith(endings)}


@functools.cache
def fingerprint() -> int:
    """A number that changes with any file of this folder, as the programs compiled with them must."""
    return int.from_bytes(hashlib.sha256(b"".join(_files((".cc", ".h", ".py")).values())).digest()[:4]) >> 1


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """The folder of the library: in the user's cache, or a temporary one where that cannot be written."""
    folder = cache_folder("cpu")
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    if os.access(folder, os.W_OK):
        yield folder
    else:  # each process then compiles for itself
        with tempfile.TemporaryDirectory(prefix="mpisjax_") as temporary:
            yield Path(temporary)


def _refuse_what_others_may_write(*paths: Path) -> None:
    """Raises ValueError for a path that somebody else owns or may write: its code would run as this user."""
    for path in paths:
        found = path.stat()
        if found.st_uid not in (0, os.getuid()):
            raise ValueError(f"{path} belongs to another user: remove it or set XDG_CACHE_HOME to a folder of yours")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"others may write {path}: run `chmod go-w {path}`")


def _flags() -> tuple[str, ...]:
    """The compiler's flags. Those of `MPISJAX_CPU_FLAGS` come last; an architecture there replaces ours."""
    more = tuple(shlex.split(os.environ.get("MPISJAX_CPU_FLAGS", "")))
    named = any(flag.startswith(("-march", "-mcpu")) for flag in more)
    return (*(flag for flag in _FLAGS if not (named and flag.startswith("-march"))), *more)


def _compiled(compiler: str, folder: Path) -> Path:
    sources = _files((".cc", ".h"))
    include = Path(jax.ffi.include_dir())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_LIMIT).stdout
    interface = (include / "xla" / "ffi" / "api" / "c_api.h").read_bytes()
    key = hashlib.sha256()
    for part in (*sources.values(), version, interface, " ".join(_flags()).encode(), _processor().encode()):
        key.update(hashlib.sha256(part).digest())
    name = f"convolutions_{key.hexdigest()[:20]}.so"
    final = folder / name
    if not final.exists():
        _log.info("compiling convolutions for this processor, once; this takes some seconds")
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            for file, content in sources.items():
                (Path(draft) / file).write_bytes(content)
            code, built = [file for file in sources if file.endswith(".cc")], Path(draft) / name

            def run(*arguments: str) -> None:
                command = [compiler, *_flags(), *arguments]
                subprocess.run(command, cwd=draft, capture_output=True, text=True, check=True, timeout=_LIMIT)

            with ThreadPoolExecutor(cores()) as pool:  # one file a core
                list(pool.map(lambda file: run(f"-I{include}", "-c", file, "-o", f"{file}.o"), code))
            run("-shared", *(f"{file}.o" for file in code), "-o", str(built))
            built.chmod(0o700)
            os.replace(built, final)  # another process may do the same at the same moment
    return final


def _processor() -> str:
    """What -march=native depends on: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
