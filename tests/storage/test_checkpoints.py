"""Checkpoints: what goes in comes out; what has been harmed in any way is named and never loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, packing, saving
from mpisjax.storage.saving import CheckpointWriter


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    rng: Any


def state_at(step: int) -> State:
    key = jax.random.key(step)
    params = {
        "a": {
            "kernel": jax.random.normal(key, (7, 5)),
            "scale": jnp.array([0.0, -0.0, jnp.nan, jnp.inf, 1e-42]),
        }
    }
    return State(jnp.int32(step), params, (), jax.random.key_data(key))


def save(directory: Path, *steps: int) -> None:
    with CheckpointWriter(directory, keep=9) as writer:
        for step in steps:
            writer.save(step, state_at(step), {"step": step, "loss": 0.1 + 0.2})


ORBAX_OWN = ("_CHECKPOINT_METADATA", "commit_success.txt")  # times and a mark: nothing of them is restored


def files(directory: Path, step: int) -> list[Path]:
    """What a checkpoint consists of: the record and the files of the state."""
    return [path for path in all_files(directory, step) if path.name not in ORBAX_OWN]


def all_files(directory: Path, step: int) -> list[Path]:
    return sorted(path for path in (directory / f"step_{step:08d}").rglob("*") if path.is_file())


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(packing.without_keys(tree)[1])]


def test_a_relative_folder_serves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("runs/digits"), 3)
    found = checkpoints.newest(Path("runs/digits"))
    assert bits(checkpoints.restore(found, state_at(0))) == bits(state_at(3))


def test_round_trip_is_exact(tmp_path):
    save(tmp_path, 3)
    found = checkpoints.newest(tmp_path)
    assert (found.step, found.content) == (3, {"step": 3, "loss": 0.1 + 0.2})
    state = checkpoints.restore(found, state_at(0))
    assert isinstance(state, State) and state.ema == ()
    assert bits(state) == bits(state_at(3))


def test_a_format_of_earlier_versions_is_refused(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / checkpoints.RECORD_NAME
    sound = json.loads(path.read_text())
    for change in ({"format": 1}, {"one_piece": False}):
        written = {**sound, **change}
        written["digest"] = checkpoints._digest_of_record(written)
        path.write_text(json.dumps(written))
        with pytest.raises(UserError, match="no longer read; use the version that wrote it"):
            checkpoints.read(tmp_path, 1)


def test_what_comes_back_lies_where_the_template_does(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save(tmp_path, 1)
    state = checkpoints.restore(checkpoints.read(tmp_path, 1), jax.device_put(state_at(0), whole))
    assert bits(state) == bits(state_at(1))
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(state))


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert checkpoints.newest(tmp_path / "absent") is None


def test_update_replaces_the_content_alone(tmp_path):
    save(tmp_path, 3)
    checkpoints.update(checkpoints.read(tmp_path, 3), {"validation": 0.5})
    assert checkpoints.read(tmp_path, 3).content == {"validation": 0.5}
    assert bits(checkpoints.restore(checkpoints.read(tmp_path, 3), state_at(0))) == bits(state_at(3))


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(3, state_at(9), {})
    assert bits(checkpoints.restore(checkpoints.read(tmp_path, 3), state_at(0))) == bits(state_at(9))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "random": lambda path: path.write_bytes(os.urandom(200)),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_to_any_file_is_named_and_the_one_before_is_used(tmp_path, log, harm):
    save(tmp_path / "sound", 3, 5)
    for number in range(len(files(tmp_path / "sound", 5))):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", directory)
        victim = files(directory, 5)[number]
        HARM[harm](victim)
        log.clear()
        found = checkpoints.newest(directory)
        assert found.step == 3
        assert str(victim) in log.text


@pytest.mark.parametrize("harm", HARM)
def test_harm_to_what_orbax_notes_for_itself_changes_nothing(tmp_path, harm):
    save(tmp_path / "sound", 3, 5)
    own = [path for path in all_files(tmp_path / "sound", 5) if path.name in ORBAX_OWN]
    assert len(own) >= 2
    for number in range(len(own)):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", directory)
        HARM[harm](directory / own[number].relative_to(tmp_path / "sound"))
        with CheckpointWriter(directory, keep=9) as writer:
            found = writer.newest()
            assert found.step == 5 and bits(checkpoints.restore(found, state_at(0))) == bits(state_at(5))
            checkpoints.update(found, {})
            writer.save(6, state_at(6), {})
        assert checkpoints.steps(directory) == [3, 5, 6]
        assert bits(checkpoints.restore(checkpoints.newest(directory), state_at(0))) == bits(state_at(6))


def test_an_added_file_is_not_trusted(tmp_path, log):
    save(tmp_path, 3, 5)
    (tmp_path / "step_00000005" / "state" / "more.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert checkpoints.newest(tmp_path).step == 3
    assert "more.pkl" in log.text


def test_empty_folder_is_damaged(tmp_path, log):
    save(tmp_path, 3)
    (tmp_path / "step_00000005").mkdir()
    with CheckpointWriter(tmp_path) as writer:
        assert writer.newest().step == 3
    assert "checkpoint of step 5 is damaged" in log.text
    assert checkpoints.steps(tmp_path) == [3]


def test_all_damaged_is_refused_again_and_again(tmp_path):
    save(tmp_path, 3, 5)
    for step in (3, 5):
        flip(files(tmp_path, step)[-1])
    for _ in range(2):
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged; delete the folder"):
            checkpoints.newest(tmp_path)


def test_the_latest_and_the_best_are_kept_and_the_dead_are_cleared(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_00000006.orbax-checkpoint-tmp").mkdir()
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(5, state_at(5), {}, best=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000005"]


def test_another_structure_is_refused(tmp_path):
    save(tmp_path, 3)
    template = state_at(0)._replace(params={"b": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"state.params\['a'\]\['kernel'\] is float32\[7, 5\] there and absent here"):
        checkpoints.restore(checkpoints.read(tmp_path, 3), template)
    wider = state_at(0)._replace(rng=jnp.zeros(5, jnp.uint32))
    with pytest.raises(UserError, match=r"state.rng is uint32\[2\] there and uint32\[5\] here"):
        checkpoints.restore(checkpoints.read(tmp_path, 3), wider)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_failure_at_any_sync_leaves_the_older_one_whole(tmp_path, monkeypatch, number):
    save(tmp_path, 3)
    real, calls, limit = os.fsync, [0], [0]

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > limit[0]:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    told = 0
    for limit[0] in range(30):
        calls[0] = 0
        try:
            save(tmp_path, 5)
        except UserError as error:
            told += 1
            words = "is full" if number == errno.ENOSPC else "cannot be written"
            assert words in str(error) and "step 3 stands" in str(error) and "\n" not in str(error)
        else:
            break
        assert checkpoints.newest(tmp_path).step in (3, 5)
        assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob("*/*.draft"))
        if (tmp_path / "step_00000005").exists():
            shutil.rmtree(tmp_path / "step_00000005")
    assert told > 5


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, packing, saving
from mpisjax.storage import saving
directory = Path(sys.argv[1])
noise = np.random.default_rng(0).normal(size=100_000)
writer = saving.CheckpointWriter(directory)
writer.save(1, {"w": noise}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    writer.save(2, {"w": noise + 1}, {})
except UserError as error:
    print(error)
print(checkpoints.newest(directory).step, *sorted(path.name for path in directory.iterdir()))
"""


def test_a_file_that_cannot_grow_is_told_in_one_sentence(tmp_path):
    """The kernel refuses the write inside tensorstore's own threads, as it does on a full disk."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "c"],
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
        check=True,
    )
    sentence, standing = run.stdout.splitlines()
    assert sentence.startswith("the disk of") and "step 1 stands" in sentence
    assert standing == "1 step_00000001"
    assert "raised an exception" not in run.stderr  # the log of orbax's threads


def test_a_save_that_the_disk_cannot_hold_is_not_begun(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, {"w": np.zeros(1000)}, {})
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=saving.OVERHEAD + 7999))
        with pytest.raises(UserError, match="is full, so the checkpoint of step 2 was not written"):
            writer.save(2, {"w": np.zeros(1000)}, {})
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=saving.OVERHEAD + 8000))
        writer.save(2, {"w": np.zeros(1000)}, {})


HOSTILE = """
import pickle, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from mpisjax.storage import checkpoints, packing, saving
from mpisjax.storage import saving
directory, seen = Path(sys.argv[1]), []
state = {"w": np.arange(300.0), "b": np.ones(3)}
with saving.CheckpointWriter(directory / "sound") as writer:
    writer.save(1, state, {})
checkpoints.restore(checkpoints.read(directory / "sound", 1), state)  # imports all there is to import
watched = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "compile", "exec")
def told_in_a_traceback():  # where Python parses the line that failed, to underline it
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("traceback.py"):
        frame = frame.f_back
    return frame is not None
def watch(event, arguments):
    if event in watched and not (event == "compile" and told_in_a_traceback()):
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(watch)
sys.unraisablehook = lambda told: None  # Python's own compiles the line that failed, to underline it
class Payload:
    def __reduce__(self):
        return exec, ("open(%r, 'w')" % str(directory / "executed"),)
payloads = [pickle.dumps(Payload()), b'{"a": __import__("os").system("touch %s")}' % bytes(directory / "executed")]
files = [p.relative_to(directory / "sound") for p in (directory / "sound").rglob("*") if p.is_file()]
tried = refused = 0
for name in files:
    for payload in payloads:
        shutil.rmtree(directory / "hostile", ignore_errors=True)
        shutil.copytree(directory / "sound", directory / "hostile")
        (directory / "hostile" / name).write_bytes(payload)
        path = directory / "hostile" / "step_00000001"
        if name.name != checkpoints.RECORD_NAME:  # signed again, as somebody would who can write the folder
            signed = checkpoints.Checkpoint(path, 1, packing.layout_of(state), {})
            checkpoints.write_record(signed, checkpoints.digests(path / "state"))
        tried += 1
        try:
            checkpoints.restore(checkpoints.read(directory / "hostile", 1), state)
        except Exception as error:
            refused += 1
print(tried, refused, (directory / "executed").exists(), seen)
"""


def test_nothing_in_a_checkpoint_is_executed_even_with_the_right_digests(tmp_path):
    """Every file in turn becomes a program, as a pickle or as an expression: none of them runs."""
    ended = subprocess.run([sys.executable, "-c", HOSTILE, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    tried, refused, executed, seen = ended.stdout.split(maxsplit=3)
    assert int(tried) >= 10 and int(refused) >= 2 and executed == "False"
    assert seen == "[]\n"
