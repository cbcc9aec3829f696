"""What the machine refuses: full and read-only disks, an unwritable cache, a missing plugin, another JAX. One sentence
each.

Disks are real: a small file system in memory that only the program under test sees (Linux's mount namespaces).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.py")
ALONE = ["unshare", "--mount", "--map-root-user"]


def may_mount() -> bool:
    """Whether this user may mount a file system that nobody else sees."""
    command = [*ALONE, "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


mounts = pytest.mark.skipif(not may_mount(), reason="needs Linux and the right to mount in a namespace")


def environment(**more: object) -> dict[str, str]:
    """This process's, with the repository on the path of programs."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHON": sys.executable,
        **{k: str(v) for k, v in more.items()},
    }


def shell(script: str, **more: object) -> subprocess.CompletedProcess:
    """Runs a script that may mount what it likes."""
    return subprocess.run(
        [*ALONE, "sh", "-ec", script], capture_output=True, text=True, env=environment(**more), check=False
    )


FULL = """
mount -t tmpfs -o size=340k none "$DISK"
head -c 200k /dev/zero > "$DISK/in_the_way"
run() { "$PYTHON" "$TINY" --workdir "$DISK/run" --config.train.checkpoint_every=3 --config.train.keep_checkpoints=9; }
run 2> "$OUT/first" || echo $? > "$OUT/code"
ls "$DISK/run/checkpoints" > "$OUT/standing"
cp -r "$DISK/run" "$OUT/run"
rm "$DISK/in_the_way"
mount -o remount,size=9m "$DISK"
run 2> "$OUT/second"
cp "$DISK/run/results.json" "$OUT"
"""


@mounts
@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_the_older_checkpoint_stands(tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir(), out.mkdir()
    ended = shell(FULL, DISK=disk, OUT=out, TINY=TINY)
    assert ended.returncode == 0, (ended.stderr, *(path.read_text() for path in out.glob("*t")))
    assert (out / "code").read_text() == "1\n"
    *before, said = (line for line in (out / "first").read_text().splitlines() if line[:6] != "epoch ")
    assert said.startswith(("error: the disk of ", "error: metrics cannot be written "))
    assert "run the same command to go on" in said
    assert before == [] or (len(before) == 1 and "rows were not written" in before[0])
    standing = (out / "standing").read_text().split()
    assert standing and all(name.startswith("step_") for name in standing)
    from mpisjax.storage import checkpoints

    newest = checkpoints.newest(out / "run" / checkpoints.FOLDER)
    assert newest is not None
    if "the disk of" in said:
        assert f"the one of step {newest.step} stands" in said
    assert f"going on from the checkpoint of step {newest.step} of 24" in (out / "second").read_text()
    assert (out / "results.json").read_text()


READ_ONLY = """
mount -t tmpfs none "$DISK"
mkdir "$DISK/there"
mount -o remount,ro "$DISK"
exec "$PYTHON" -c '
import sys
from mpisjax.errors import UserError
from mpisjax.storage.run_folder import hold
for name in ("there", "absent"):
    try:
        hold(f"{sys.argv[1]}/{name}").__enter__()
    except UserError as error:
        print(error)
' "$DISK"
"""


@mounts
def test_a_read_only_workdir_is_told(tmp_path):
    ended = shell(READ_ONLY, DISK=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for said, what in zip(ended.stdout.splitlines(), ("written", "made"), strict=True):
        assert said.startswith("--workdir ")
        assert f"cannot be {what} (Read-only file system); name a folder you may write to" in said


CACHE = """
mount -t tmpfs none "$DISK"
mkdir -p "$DISK/there/mpisjax/compiled"
mount -o remount,ro "$DISK"
XDG_CACHE_HOME="$DISK/$NAME" exec env -u JAX_COMPILATION_CACHE_DIR "$PYTHON" -c '
import jax
from mpisjax.training import devices
assert devices.compilation_cache() == ""
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1)(1.0)
'
"""


@mounts
@pytest.mark.parametrize("name", ["there", "absent"])
def test_an_unwritable_compilation_cache_is_told_once(tmp_path, name):
    ended = shell(CACHE, DISK=tmp_path, NAME=name)
    assert ended.returncode == 0, ended.stderr
    assert f"the compilation cache {tmp_path}/{name}/mpisjax/compiled cannot be written" in ended.stderr
    assert ended.stderr.count("\n") == 1 and "XDG_CACHE_HOME" in ended.stderr


def train_py(tmp_path: Path, *arguments: str, **more: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "train.py", "--workdir", tmp_path / "run", *arguments]
    surroundings = {"XDG_CACHE_HOME": tmp_path, "MPISJAX_CPU": "0", **more}  # compiling would be told, too
    return subprocess.run(command, capture_output=True, text=True, env=environment(**surroundings), check=False)


def test_a_missing_gpu_plugin_is_told(tmp_path):
    ended = train_py(tmp_path, JAX_PLATFORMS="cuda")
    if ended.returncode == 0:
        pytest.skip("this machine has a GPU and its plugin")
    assert ended.returncode == 1 and not (tmp_path / "run").exists()
    assert ended.stderr.startswith("error: JAX finds no device for JAX_PLATFORMS='cuda'; install its plugin")
    assert ended.stderr.count("\n") == 1


def test_another_jax_is_told(tmp_path):
    """`train.py` asks the installed package for its version; here a made-up one comes first on the path."""
    about = tmp_path / "site" / "jax-0.9.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.9.2\n")
    path = os.pathsep.join([str(about.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = train_py(tmp_path, PYTHONPATH=path)
    assert ended.returncode == 1 and not (tmp_path / "run").exists()
    assert ended.stderr.startswith("error: JAX 0.9.2 is too old; mpisjax needs 0.10 or newer")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_long_run_samples_a_short_one(tmp_path):
    """Two epochs of it: too few to judge growth by, enough to see that it counts."""
    command = [
        sys.executable,
        ROOT / "tests" / "long_run.py",
        "--steps=60",
        "--every=50",
        f"--workdir={tmp_path / 'run'}",
    ]
    command += ["--config.model.stem=(4,)", "--config.model.layers=(4, 4)", "--config.train.batch_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1) and "78 steps in" in done.stdout and ", 2 samples;" in done.stdout
    # The first sample comes before the first step. Programs that compile for over a second are cached: how many do, is
    # the machine's affair.
    assert re.search(r"GREW: cached: 0 programs became [1-9]", done.stdout)
