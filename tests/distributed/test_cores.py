"""How a CPU is split, before JAX looks: one host device with a pool, or one a core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpisjax.cpu import library

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, sys
import jax
from configs import fashion_mnist
from mpisjax.configuration.makers import prepare_cores
from mpisjax.cpu import cores, library

def found(case):
    config = fashion_mnist.get_config()
    for key, value in case["config"].items():
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    os.environ.update(case["environment"])
    prepare_cores(config) if case["given"] else cores.prepare(**case["arguments"])
    return [len(jax.devices()), library.threads(), os.environ.get("PJRT_NPROC")]

for case in json.loads(sys.argv[1]):  # each in a process in which JAX has not looked yet
    if os.fork() == 0:
        print(json.dumps([case["name"], found(case)]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""


def case(name, given=True, environment=None, arguments=None, **config):
    settings = {key.replace("__", "."): value for key, value in config.items()}
    return {
        "name": name,
        "given": given,
        "config": settings,
        "environment": environment or {},
        "arguments": arguments or {},
    }


@pytest.fixture(scope="module")
def found():
    cases = [
        case("plain"),
        case("no config", given=False),
        case("no config, one core", given=False, arguments={"all_cores": False}),
        case("one core", devices__all_cores=False),
        case("uneven", model__layers=[24, 33]),
        case("narrow", model__layers=[4, 32]),
        case("coarse", model__dtype="bfloat16"),
        case("split channels", devices__model_parallel=2),
        case("nothing compiled", environment={"MPISJAX_CPU": "0"}),
        case("forced", environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}),
        case("pool", environment={"PJRT_NPROC": "1"}),
    ]
    clean = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PJRT_NPROC", "MPISJAX_CPU")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(cases)],
        env={**clean, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(line) for line in ran.stdout.splitlines())


CORES = library.cores()
SPARE = str(4 * (os.cpu_count() or 1))


@pytest.mark.skipif(not library.available(), reason="this machine compiles no convolutions")
@pytest.mark.parametrize("name", ["plain", "uneven", "no config"])
def test_a_network_that_is_served_takes_one_device_and_no_spare_threads(found, name):
    assert found[name] == [1, CORES, None]


@pytest.mark.parametrize("name", ["narrow", "coarse", "split channels", "nothing compiled"])
def test_others_take_a_device_a_core_and_threads_to_spare(found, name):
    assert found[name] == [CORES, CORES, SPARE]


@pytest.mark.parametrize("name", ["one core", "no config, one core"])
def test_one_core_can_be_asked_for(found, name):
    assert found[name] == [1, 1, "1"]


def test_what_the_user_set_stays(found):
    assert found["forced"][0] == 3
    assert found["pool"][1:] == [1, "1"]
