"""Importing mpisjax, all of it, opens no connection, listens nowhere and executes nothing; tests stay at home."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import sys
reached = []
names = ("connect", "bind", "getaddrinfo", "gethostbyname", "sendto")
events = (*("socket." + name for name in names), "urllib.Request")
sys.addaudithook(lambda event, arguments: reached.append((event, str(arguments))) if event in events else None)
import importlib, pkgutil
import mpisjax
names = [m.name for m in pkgutil.walk_packages(mpisjax.__path__, "mpisjax.") if not m.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an optional package
        if error.name.startswith("mpisjax"):
            raise
assert len(names) > 40, names
print(reached)
"""


def test_importing_everything_opens_no_connection():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[]\n"


def test_tests_stay_at_home():
    with pytest.raises(RuntimeError, match="a test reaches for"), socket.socket() as far:
        far.connect(("192.0.2.1", 80))  # an address for documentation, which nobody has
    with pytest.raises(RuntimeError, match="a test reaches for"):
        socket.getaddrinfo("example.org", 80)
    with (
        socket.create_server(("127.0.0.1", 0)) as near,
        socket.create_connection(near.getsockname()) as there,
    ):
        assert there
