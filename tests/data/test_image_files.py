"""IDX and CIFAR files, whole and broken."""

import functools
import gzip
import io
import pickle
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
from data_helpers import cifar_members, idx_bytes, images_of, settings, tar_bytes, write_idx

from mpisjax import data
from mpisjax.data import images
from mpisjax.data.pickles import unpickle
from mpisjax.errors import UserError

# Without the time of day, which would get into the names of the tests below and part the processes that share them.
zipped = functools.partial(gzip.compress, mtime=0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("packed", ["archive", "plain archive", "folder", "loose"])
def test_cifar_in_every_form(tmp_path, rng, name, version, packed):
    members, arrays = cifar_members(name, rng, 20, version)
    layout = images.CIFAR_LAYOUTS[name][0 if version == "binary" else 1]
    if "archive" in packed:
        content = tar_bytes([(f"{layout.folder}/readme.html", b"x"), *members], "w" if "plain" in packed else "w:gz")
        (tmp_path / layout.archive).write_bytes(content)
    else:
        (tmp_path / layout.folder).mkdir()
        for path, content in members:
            (tmp_path / (path if packed == "folder" else path.rpartition("/")[2])).write_bytes(content)
    dataset = data.load(**settings(name=name, dir=str(tmp_path), num_validation=0))
    assert np.array_equal(dataset.train.images, images_of(arrays["train"][0]))
    assert np.array_equal(dataset.train.labels, arrays["train"][1])
    assert np.array_equal(dataset.test.images, images_of(arrays["test"][0]))
    assert np.array_equal(dataset.test.labels, arrays["test"][1])
    assert "SUBSET" in dataset.source and "of 50,000 and 10,000" in dataset.source
    assert dataset.num_classes == layout.num_classes and len(dataset.mean) == 3


def test_some_batches_are_a_subset(tmp_path, rng):
    members, _ = cifar_members("cifar10", rng, 20)
    for path, content in (members[0], members[3], members[5]):
        (tmp_path / path.rpartition("/")[2]).write_bytes(content)
    dataset = data.load("cifar10", dir=tmp_path)
    assert len(dataset.train.labels) == 40 and "SUBSET: 40 train and 20 test" in dataset.source


class Trap:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return (TRACE.append, ("ran",))


TRACE: list = []


@pytest.mark.parametrize("protocol", range(5))
def test_pickles_are_read_but_not_run(protocol, rng):
    batch = {
        "data": rng.integers(0, 256, (3, 3072), np.uint8),
        "labels": [1, 2, 300],
        "names": ["a", b"b"],
        "n": None,
    }
    read = unpickle(pickle.dumps(batch, protocol), "batch")
    assert np.array_equal(read["data"], batch["data"]) and read["labels"] == [1, 2, 300] and read["n"] is None
    for bad in (Trap(), {"data": Trap()}, {"data": OrderedDict()}, {"data": np.zeros(3)}, [1], {1: 2}):
        with pytest.raises(UserError, match="batch"):
            unpickle(pickle.dumps(bad, protocol), "batch")
    assert not TRACE


def test_a_pickle_of_python_2(rng):
    """As the official files are written: protocol 2, `str` for bytes, and an array's bytes as a `str` too."""
    pixels = rng.integers(0, 256, (2, 3072), np.uint8)
    content = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x16training batch 1 of 5\x20q\x03U\x06labelsq\x04]q\x05(K\x06K\x09e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\x00tb\x89T\x00\x18\x00\x00" + pixels.tobytes() + b"tbu."
    )
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels), "the example itself is right"
    read = unpickle(content, "batch")
    assert np.array_equal(read["data"], pixels) and read["labels"] == [6, 9]


# 10,000 copies of a text of 100,000 letters, as protocol 2 writes bytes.
TEXT = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
COPIES = TEXT + b"(" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 10_000 + b"l."


DEEP = b"N" + b"\x85" * 100_000  # a tuple whose hash would overflow Python's stack
# The same, each tuple handed to a call first, as arguments are, and taken from the memo for the next.
THROUGH_THE_MEMO = b"Nq\x00" + b"cnumpy.core.multiarray\n_reconstruct\nh\x00\x85q\x00R" * 100_000
DEEP_KEYS = {
    "in a dict": b"}" + DEEP + b"Ns.",
    "in a dict, of several": b"}(" + DEEP + b"Nu.",
    "in a dict at once": b"(" + DEEP + b"Nd.",
    "in a set": b"\x8f(" + DEEP + b"\x90.",
    "in a frozen set": b"(" + DEEP + b"\x91.",
    "through the memo": THROUGH_THE_MEMO + b"}h\x00Ns.",
}


@pytest.mark.parametrize("content", DEEP_KEYS.values(), ids=DEEP_KEYS)
def test_a_key_that_is_nested_deeply_is_not_hashed(content):
    with pytest.raises(UserError, match="is not a pickle of plain arrays and lists"):
        unpickle(b"\x80\x02" + content, "batch")


def test_a_pickle_that_wants_memory_gets_none():
    claims = [
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02T\xff\xff\xff\x7f.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + (1 << 32).to_bytes(8, "little") + b".",
    ]
    for content in claims:
        with pytest.raises(UserError, match="not a pickle"):
            unpickle(content, "batch")
    with pytest.raises(UserError, match="more bytes than the file has"):
        unpickle(b"\x80\x02" + COPIES, "batch")


def write_archive(tmp_path, content):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    return settings(name="cifar10", dir=str(tmp_path), num_validation=0, source="files")


def test_broken_archives_are_refused(tmp_path, rng):
    members, _ = cifar_members("cifar10", rng, 20)
    whole = tar_bytes(members)
    for cut in (0, 1, 10, 300, len(whole) // 2, len(whole) - 4):
        with pytest.raises(UserError, match="truncated|damaged|holds no"):
            data.load(**write_archive(tmp_path, whole[:cut]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    with pytest.raises(UserError, match="truncated or damaged"):
        data.load(**write_archive(tmp_path, bytes(flipped)))
    assert not list((tmp_path / "cache").rglob("*.npy"))
    data.load(**write_archive(tmp_path, whole))


def test_links_and_bombs_are_refused(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="test_batch.bin is no regular file"):
        data.load(**write_archive(tmp_path, buffer.getvalue()))
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    bomb = tar_bytes([("zeros", bytes(8 << 20))])
    assert len(bomb) < 1 << 16
    with pytest.raises(UserError, match="more than 1 MiB"):
        data.load(**write_archive(tmp_path, bomb))


def test_members_that_climb_out_are_read_and_written_nowhere(tmp_path, rng):
    members, _ = cifar_members("cifar10", rng, 2)
    others = [("../evil.bin", b"x"), (str(tmp_path / "evil"), b"x"), ("cifar-10-batches-bin/../../evil", b"x")]
    data.load(**write_archive(tmp_path, tar_bytes([*others, *members])))
    assert not list(tmp_path.parent.glob("**/evil*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "multiple of 3073"),
        (bytes(3072), "multiple of 3073"),
        (bytes(3073 + 5), "multiple of 3073"),
        (b"\x0a" + bytes(3072), "label 10"),
    ],
)
def test_wrong_records_are_refused(tmp_path, content, says):
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        data.load(**settings(name="cifar10", dir=str(tmp_path), num_validation=0))
    assert "data_batch_1.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"labels": [1]}, "no 'data'"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "no 'data'"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}, "no 'data'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "no 'labels'"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "label 10, but 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "label -1, but 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1 << 70]}, "label 1180591620717411303424, but"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}, "no 'labels'"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "other than bytes"),
    ],
)
def test_wrong_pickled_batches_are_refused(batch, says):
    with pytest.raises(UserError, match=says):
        images.parse_cifar_python(pickle.dumps(batch, 2), "batch", images.CIFAR_LAYOUTS["cifar10"][1])


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train-images-idx3-ubyte.gz", b"", "truncated"),
        ("train-images-idx3-ubyte.gz", zipped(b"\0\0\x08"), "truncated"),
        ("train-images-idx3-ubyte.gz", zipped(idx_bytes(np.zeros((5, 27, 28), np.uint8))), "28 x 28"),
        ("train-images-idx3-ubyte.gz", zipped(idx_bytes(np.zeros((0, 28, 28), np.uint8))), "holds nothing"),
        (
            "train-images-idx3-ubyte.gz",
            zipped(idx_bytes(np.zeros((29, 28, 28), np.uint8))),
            "30 labels",
        ),
        ("train-images-idx3-ubyte.gz", zipped(b"\0\0\x0d\x03" + bytes(12)), "no IDX file of bytes"),
        ("train-images-idx3-ubyte.gz", zipped(b"\0\0\x08\x03" + b"\xff" * 12), "more than"),
        ("train-images-idx3-ubyte.gz", zipped(b"\0\0\x08\x03" + bytes(4) + b"\xff" * 8), "holds nothing"),
        ("train-labels-idx1-ubyte.gz", zipped(idx_bytes(np.full(30, 10, np.uint8))), "label 10"),
        ("train-labels-idx1-ubyte.gz", zipped(idx_bytes(np.zeros(30, np.uint8)) + b"\0"), "goes on"),
        (
            "train-labels-idx1-ubyte.gz",
            zipped(idx_bytes(np.zeros(30, np.uint8)))[:-3],
            "truncated or damaged",
        ),
        ("train-labels-idx1-ubyte.gz", idx_bytes(np.zeros(30, np.uint8))[:-1], "truncated"),
    ],
)
def test_wrong_idx_files_are_refused_by_name(tmp_path, rng, file, content, says):
    write_idx(tmp_path, rng, 30, 20)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        data.load(**settings(name="mnist", dir=str(tmp_path), num_validation=0, source="files"))
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_a_gzip_bomb_costs_nothing():
    bomb = zipped(idx_bytes(np.zeros((1, 28, 28), np.uint8)) + bytes(50 << 20))
    stream = gzip.GzipFile(fileobj=io.BytesIO(bomb))
    with pytest.raises(UserError, match="goes on"):
        images.parse_idx(stream, 3, "bomb")
    assert stream.tell() < 1 << 16, "nothing is read beyond what the header declares"
