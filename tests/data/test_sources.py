"""Where image sets come from: TFDS's prepared data, files, a download from a server on this machine."""

import hashlib
import io
import json
import socket
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from data_helpers import cifar_members, settings, tar_bytes, write_idx

from mpisjax import data
from mpisjax.data import fetch, images, prepared, sources
from mpisjax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


def write_prepared(folder, file_format, num_train=12, num_test=7, seed=0, label=None):
    """A small Fashion-MNIST as TFDS lays it out; returns the arrays."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    place = folder / "fashion_mnist" / "3.0.1"
    place.mkdir(parents=True)
    rng, arrays, splits = np.random.default_rng(seed), {}, []
    for split, size in (("train", num_train), ("test", num_test)):
        images = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = np.arange(size) % 10 if label is None else np.full(size, label)
        arrays[split] = (images, labels)
        records = []
        for image, number in zip(images, labels, strict=True):
            png, example = io.BytesIO(), tf_example_pb2.Example()
            Image.fromarray(image).save(png, "PNG")
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(int(number))
            records.append(example.SerializeToString())
        path = place / f"fashion_mnist-{split}.{file_format}-00000-of-00001"
        if file_format == "array_record":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        else:
            path.write_bytes(b"".join(map(tfrecord, records)))
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append({"name": split, "shardLengths": [str(size)], "numBytes": "1", "filepathTemplate": template})
    info = {"name": "fashion_mnist", "version": "3.0.1", "fileFormat": file_format, "splits": splits}
    (place / "dataset_info.json").write_text(json.dumps(info))
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    )
    (place / "features.json").write_text(json.dumps(features.to_json()))
    return arrays


def tfrecord(record):
    length = len(record).to_bytes(8, "little")
    sums = [int(prepared.masked_crc32c([part])[0]).to_bytes(4, "little") for part in (length, record)]
    return length + sums[0] + record + sums[1]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_prepared_data_comes_first_and_needs_no_tensorflow(tmp_path, file_format):
    arrays = write_prepared(tmp_path, file_format)
    write_idx(tmp_path / "fashion_mnist", np.random.default_rng(9), 30, 20)
    dataset = data.load(**settings(name="fashion_mnist", dir=str(tmp_path), num_validation=0))
    assert "prepared by TFDS" in dataset.source and "SUBSET: 12 train and 7 test" in dataset.source
    assert np.array_equal(dataset.train.images[..., 0], arrays["train"][0])
    assert np.array_equal(dataset.test.labels, arrays["test"][1])
    assert "tensorflow" not in sys.modules
    files = data.load(**settings(name="fashion_mnist", dir=str(tmp_path), num_validation=0, source="files"))
    assert len(files.train.labels) == 30 and "files in" in files.source


def test_prepared_data_is_found_where_tfds_keeps_it(tmp_path, monkeypatch):
    write_prepared(tmp_path / "home" / "tensorflow_datasets", "tfrecord")
    assert prepared.find("fashion_mnist", "").parts[-4:-2] == ("home", "tensorflow_datasets")
    write_prepared(tmp_path / "other", "tfrecord")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "other"))
    assert prepared.find("fashion_mnist", "").parts[-3] == "other"
    assert prepared.find("cifar10", "") is None


def test_damaged_prepared_data_is_refused(tmp_path):
    write_prepared(tmp_path / "a", "tfrecord")
    path = tmp_path / "a/fashion_mnist/3.0.1/fashion_mnist-train.tfrecord-00000-of-00001"
    content = path.read_bytes()
    config = settings(name="fashion_mnist", dir=str(tmp_path / "a"), num_validation=0)
    for broken in (content[:-1], content[:8], content[:100] + b"\0" + content[101:], b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="prepare it again"):
            data.load(**config)
    write_prepared(tmp_path / "b", "array_record", label=10)
    with pytest.raises(UserError, match="label outside"):
        data.load(**settings(name="fashion_mnist", dir=str(tmp_path / "b"), num_validation=0))
    (tmp_path / "b/fashion_mnist/3.0.1/features.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read by TFDS"):
        data.load(**settings(name="fashion_mnist", dir=str(tmp_path / "b"), num_validation=0))


def test_crc32c_against_published_values():
    """RFC 3720, B.4, less TensorFlow's mask."""
    parts = [bytes(32), b"\xff" * 32, bytes(range(32)), b"123456789", b""]
    masked = prepared.masked_crc32c(parts)
    turned = masked - np.uint32(0xA282EAD8)
    crc = (turned >> 17) | (turned << np.uint32(15))
    assert [hex(c) for c in crc] == ["0x8a9136aa", "0x62a8ab43", "0x46dd794e", "0xe3069283", "0x0"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder served on this machine, standing in for the original addresses; counts the GET requests."""
    folder, gets = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            gets.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("MPISJAX_MIRROR", f"http://127.0.0.1:{httpd.server_port}/")
    yield folder, gets
    httpd.shutdown()
    httpd.server_close()


def record_checksums(monkeypatch, folder):
    """Has TFDS expect the served files, as if it had recorded their checksums."""
    original = fetch.recorded

    def recorded(name):
        infos = original(name)
        for info in infos.values():
            content = (folder / info.filename).read_bytes()
            info.checksum, info.size = hashlib.sha256(content).hexdigest(), type(info.size)(len(content))
        return infos

    monkeypatch.setattr(fetch, "recorded", recorded)


@pytest.fixture
def untouched_infos(monkeypatch):
    """Copies of TFDS's records, so that a test may change them."""
    import copy

    original = tfds.builder_cls
    monkeypatch.setattr(tfds, "builder_cls", lambda name: copy.deepcopy(_Infos(original(name).url_infos)))


class _Infos:
    def __init__(self, url_infos):
        self.url_infos = url_infos


def test_a_download_is_checked_kept_and_read_as_files(tmp_path, server, monkeypatch, untouched_infos):
    folder, gets = server
    arrays = write_idx(folder, np.random.default_rng(0), 30, 20)
    members, _ = cifar_members("cifar10", np.random.default_rng(0), 20)
    (folder / "cifar-10-binary.tar.gz").write_bytes(tar_bytes(members))
    record_checksums(monkeypatch, folder)
    for name, files in (("fashion_mnist", 4), ("cifar10", 1)):
        gets.clear()
        config = settings(name=name, num_validation=0)
        first = data.load(**config)
        assert "downloaded to" in first.source and "SUBSET" in first.source and len(gets) == files
        assert data.load(**config).checksum == first.checksum and len(gets) == files, "not downloaded twice"
    fashion = data.load(**settings(name="fashion_mnist", num_validation=0))
    assert np.array_equal(fashion.train.images[..., 0], arrays["train"][0])


def test_wrong_checksums_are_refused_and_nothing_is_kept(tmp_path, server):
    """The records are TFDS's own here, and the served files are not the originals."""
    folder, _ = server
    write_idx(folder, np.random.default_rng(0), 30, 20)
    with pytest.raises(UserError, match="wrong checksum"):
        data.load(**settings(name="fashion_mnist"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_missing_file_on_the_server_is_an_error(server):
    with pytest.raises(UserError, match="404") as caught:
        data.load(**settings(name="cifar100", source="download"))
    assert "\n" not in str(caught.value)


def test_a_server_that_falls_silent_or_hangs_up_is_given_up_on(tmp_path, monkeypatch):
    silent = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.wfile.flush()
            if "10-" not in self.path:
                silent.wait(30)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("MPISJAX_MIRROR", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setattr(fetch, "STALL_SECONDS", 0.3)
    for name in ("cifar100", "cifar10"):
        with pytest.raises(UserError, match="download of cifar10+ failed|wrong checksum"):
            data.load(**settings(name=name, source="download"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    silent.set()
    httpd.shutdown()
    httpd.server_close()


def test_prepared_data_without_tfds_is_passed_over(tmp_path, monkeypatch):
    write_prepared(tmp_path, "tfrecord")
    write_idx(tmp_path / "fashion_mnist", np.random.default_rng(9), 30, 20)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    assert "files in" in data.load(**settings(name="fashion_mnist", dir=str(tmp_path), num_validation=0)).source


def test_tfds_records_the_files_that_are_read(monkeypatch):
    monkeypatch.delenv("MPISJAX_MIRROR")
    for name in ("mnist", "fashion_mnist"):
        recorded = {info.filename for info in fetch.recorded(name).values()}
        assert recorded == {f"{stem}.gz" for stem in images.IDX_FILES.values()}
    for name in ("cifar10", "cifar100"):
        (info,) = fetch.recorded(name).values()
        assert info.filename == sources.SETS[name].wanted and len(info.checksum) == 64


def no_data(config):
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        data.load(**config)
    assert time.monotonic() - began < 10, "a bound of the specification, far above what is usual"
    return str(caught.value)


@pytest.mark.parametrize("network", ["refused", "black hole", "no names"])
def test_no_data_and_no_network_is_one_sentence(tmp_path, monkeypatch, network):
    def silence(*_, **__):
        time.sleep(60)
        raise OSError("no answer yet")  # the asking thread outlives the test

    if network == "black hole":
        monkeypatch.setattr(socket, "create_connection", silence)
        monkeypatch.setattr(socket.socket, "connect", silence)
    elif network == "no names":
        monkeypatch.setenv("MPISJAX_MIRROR", "http://nowhere.invalid")
        monkeypatch.setattr(socket, "getaddrinfo", silence)
    for folder, says in (("", "cannot be reached"), (str(tmp_path), "data.name to folder")):
        said = no_data(settings(name="fashion_mnist", dir=folder))
        for word in (*images.IDX_FILES.values(), str(tmp_path), says, "data.dir"):
            assert word in said
        assert "\n" not in said
    if network == "refused":
        assert "cifar-100-binary.tar.gz" in no_data(settings(name="cifar100"))


def test_settings_are_checked(tmp_path):
    for changes, says in (
        ({"name": "imagenet"}, "data.name"),
        ({"name": "mnist", "source": "web"}, "data.source"),
        ({"name": "mnist", "dir": str(tmp_path / "absent")}, "no such folder"),
        ({"num_validation": 5000}, "num_validation"),
        ({"crop": 4}, "event sets"),
        ({"split_seed": -1}, "seed"),
    ):
        with pytest.raises(UserError, match=says):
            data.load(**settings(**changes))
