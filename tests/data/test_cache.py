"""The cache: whole or absent, whatever happens while it is filled."""

import errno
import multiprocessing
import os
import time

import numpy as np
import pytest
from data_helpers import settings, write_idx

from mpisjax import data
from mpisjax.data import cache
from mpisjax.errors import UserError


def build_from(value, count=None):
    def build(allocate):
        if count is not None:
            count.append(1)
        writer = allocate("numbers", (6, 2), np.uint16)
        for row in range(0, 6, 2):
            writer.append(np.full((2, 2), value + row))
        return {"value": value}

    return build


WANTED = np.repeat(np.array([7, 7, 9, 9, 11, 11], np.uint16)[:, None], 2, 1)


def test_built_once_and_mapped(tmp_path):
    count = []
    for _ in range(3):
        entry = cache.fetch(tmp_path, "set", {"a": 1}, build_from(7, count))
        assert np.array_equal(entry.arrays["numbers"], WANTED) and entry.facts == {"value": 7} and not entry.note
        assert isinstance(entry.arrays["numbers"], np.memmap) and not entry.arrays["numbers"].flags.writeable
    assert len(count) == 1
    assert cache.fetch(tmp_path, "set", {"a": 2}, build_from(8, count)).facts == {"value": 8}
    assert len(count) == 2


def test_the_default_folder_is_the_users_cache(tmp_path):
    cache.fetch("", "set", {}, build_from(7))
    assert list((tmp_path / "cache" / "mpisjax").glob("set-*/numbers.npy"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "facts", "json"])
def test_a_damaged_entry_is_made_anew(tmp_path, damage):
    cache.fetch(tmp_path, "set", {}, build_from(7))
    (path,) = tmp_path.glob("set-*/numbers.npy")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    elif damage in ("facts", "json"):
        (path.parent / "entry.json").write_text("[]" if damage == "facts" else "{")
    else:
        path.write_bytes(content[: -5 if damage == "truncate" else 0])
    count = []
    for _ in range(2):
        assert np.array_equal(cache.fetch(tmp_path, "set", {}, build_from(7, count)).arrays["numbers"], WANTED)
    assert len(count) == 1
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["set-"], "nothing is left over"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(allocate):
        allocate("numbers", (2,), np.uint8).append(np.zeros(1, np.uint8))
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="source"):
        cache.fetch(tmp_path, "set", {}, build)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_means_memory_and_a_note(tmp_path, monkeypatch):
    class Full(cache._OnDisk):
        def append(self, rows):
            if self._rows >= 2:
                raise cache.NotWritten(os.strerror(errno.ENOSPC))
            super().append(rows)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_OnDisk", Full)
        entry = cache.fetch(tmp_path, "set", {}, build_from(7))
    assert np.array_equal(entry.arrays["numbers"], WANTED) and "No space left" in entry.note
    assert not list(tmp_path.iterdir())
    assert not cache.fetch(tmp_path, "set", {}, build_from(7)).note


def _limited(folder, results):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond: as a full disk does

    def write_big(allocate):
        return allocate("big", (400, 1000), np.uint8).append(np.full((400, 1000), 3)) or {}

    entry = cache.fetch(folder, "set", {}, write_big)
    results.put((int(entry.arrays["big"].sum()), entry.note, os.listdir(folder)))


def test_a_disk_that_really_refuses(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_limited, args=(tmp_path, results))
    process.start()
    total, note, left = results.get(timeout=60)
    process.join()
    assert total == 1_200_000 and "cannot be written" in note and left == []


def test_an_unwritable_folder_means_memory_and_a_note(tmp_path):
    (tmp_path / "file").write_text("in the way")
    entry = cache.fetch(tmp_path / "file", "set", {}, build_from(7))
    assert np.array_equal(entry.arrays["numbers"], WANTED) and str(tmp_path / "file") in entry.note
    write_idx(tmp_path / "mnist", np.random.default_rng(0), 30, 20)
    config = settings(name="mnist", dir=str(tmp_path), cache_dir=str(tmp_path / "file"), num_validation=0)
    assert "nothing was cached" in data.load(**config).source


def _fill_slowly(folder, start, results):
    def build(allocate):
        writer = allocate("numbers", (6, 2), np.uint16)
        for row in range(6):
            time.sleep(0.02)
            writer.append(WANTED[row : row + 1])
        return {"pid": os.getpid()}

    start.wait(30)
    entry = cache.fetch(folder, "set", {}, build)
    results.put((np.array_equal(entry.arrays["numbers"], WANTED), entry.facts["pid"], entry.note))


def test_runs_that_fill_one_entry_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    runs = [context.Process(target=_fill_slowly, args=(tmp_path, start, results)) for _ in range(3)]
    for run in runs:
        run.start()
    got = [results.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert all(right and not note for right, _, note in got)
    assert len({pid for _, pid, _ in got}) == 1, "all use the entry of the first to finish"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_dead_runs_left_is_removed(tmp_path):
    for name, age in ((".filling-old", 2 * 86400), (".filling-new", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.fetch(tmp_path, "set", {}, build_from(7))
    assert not (tmp_path / ".filling-old").exists() and (tmp_path / ".filling-new").exists()


def test_a_source_that_changes_is_read_again(tmp_path):
    rng = np.random.default_rng(0)
    config = settings(name="mnist", dir=str(tmp_path), num_validation=0)
    for _ in range(2):
        arrays = write_idx(tmp_path / "mnist", rng, 30, 20)
        assert np.array_equal(data.load(**config).train.images[..., 0], arrays["train"][0])
