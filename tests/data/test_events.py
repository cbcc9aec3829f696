"""Event sets: readers, frames, the simulated camera, and whole sets from small recordings in their formats."""

import hashlib
import io
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
from data_helpers import aedat2_bytes, aedat3_bytes, nmnist_bytes, random_events, settings, write_nmnist

from mpisjax import data
from mpisjax.data import digits, fetch
from mpisjax.data.events import readers, saccades, sets
from mpisjax.data.events.frames import Binning, Frames, count_frames, stored_row
from mpisjax.errors import UserError

tonic = pytest.importorskip("tonic")
FILES = Path(__file__).parent / "files"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def read(tmp_path, suffix, content, width=128, height=128):
    path = tmp_path / f"recording{suffix}"
    path.write_bytes(content)
    readers.forget()
    return readers.read(readers.Recording(path, 0), width, height)


def gesture_bytes(recorded):
    rows = np.stack([recorded["x"], recorded["y"], recorded["p"], recorded["t"] // 1000], 1)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def test_every_format_gives_its_events_back(tmp_path, rng):
    small = random_events(rng, 500, 34, 34)
    assert np.array_equal(read(tmp_path, ".bin", nmnist_bytes(small), 34, 34), small)
    recorded = random_events(rng, 500, 128, 128)
    assert np.array_equal(read(tmp_path, ".aedat", aedat2_bytes(recorded)), recorded)
    assert np.array_equal(read(tmp_path, ".aedat", aedat3_bytes(recorded)), recorded)
    recorded["t"] = recorded["t"] // 1000 * 1000
    assert np.array_equal(read(tmp_path, ".npy", gesture_bytes(recorded)), recorded)


def test_aedat4_written_by_the_makers_library():
    """The file was written by dv-processing 2.0.4."""
    pytest.importorskip("aedat")
    got = readers.read(readers.Recording(FILES / "small.aedat4", 0), 128, 128)
    wanted = np.load(FILES / "small_aedat4_events.npy")
    assert np.array_equal(np.stack([got[name] for name in "xytp"], 1), wanted)


def test_damaged_aedat4_is_invalid(tmp_path):
    pytest.importorskip("aedat")
    content = (FILES / "small.aedat4").read_bytes()
    for broken in (b"", content[:100], content[:-700], b"\0" * 500):
        with pytest.raises(readers.Invalid):
            read(tmp_path, ".aedat4", broken)


def test_nmnist_clock_overflows_as_tonic_has_them(tmp_path, rng):
    recorded = random_events(rng, 100, 34, 34, duration=8192)
    content = bytearray(nmnist_bytes(recorded))
    content[50 * 5 : 50 * 5] = bytes([0, 240, 0, 0, 0])
    later = recorded.copy()
    later["t"][50:] += 8192
    assert np.array_equal(read(tmp_path, ".bin", bytes(content), 34, 34), later)
    with pytest.raises(readers.Invalid, match="overflows"):
        read(tmp_path, ".bin", bytes([0, 240, 0, 0, 0]) * 2000)


def changed(recorded, **fields):
    other = recorded.copy()
    for name, value in fields.items():
        other[name][7] = value
    return other


def test_invalid_recordings_say_why(tmp_path, rng):
    small, large = random_events(rng, 50, 34, 34), random_events(rng, 50, 128, 128)
    back = changed(small, t=small["t"][-1])
    rows = np.zeros((3, 4), np.int64)
    cases = [
        (".bin", b"", "no event"),
        (".bin", nmnist_bytes(small)[:-1], "truncated"),
        (".bin", nmnist_bytes(changed(small, x=34)), r"\(34, \d+\), outside of the 34 x 34"),
        (".bin", nmnist_bytes(changed(small, y=200)), "outside"),
        (".bin", nmnist_bytes(back), "time goes back from .* at event 8"),
        (".aedat", aedat2_bytes(large)[:-1], "truncated"),
        (".aedat", aedat2_bytes(large)[:20], "truncated within its header"),
        (".aedat", aedat2_bytes(changed(large, t=10**6)), "time goes back"),
        (".aedat", aedat2_bytes(changed(large, x=-1000)), "more than 16 bits"),
        (".aedat", b"#!AER-DAT2.0\r\n" + np.array([[1 << 15, 5]], ">u4").tobytes(), "no event"),
        (".aedat", b"nonsense", "does not begin"),
        (".aedat", aedat3_bytes(large)[:-1], "truncated within a packet"),
        (".aedat", aedat3_bytes(large)[:-20], "truncated within a packet's header"),
        (".aedat", aedat3_bytes(changed(large, x=128)), "outside"),
        (".aedat", aedat3_bytes(large[::-1]), "time goes back"),
        (".aedat", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n", "no event"),
        (".npy", b"\x93NUMPY", "no array"),
        (".npy", gesture_bytes(large)[:-1], "no array"),
        (".npy", _npy(rows[:0]), "no event"),
        (".npy", _npy(rows + 2), "polarities"),
        (".npy", _npy(rows[:, :3]), "rows"),
        (".npy", _npy(rows - 1), "outside"),
        (".npy", _npy(np.array([[0, 0, 0, np.nan]])), "numbers"),
        (".npy", _npy(np.array([[2**40, 0, 0, 0]])), "outside"),
        (".npy", _npy(np.array([[0, 0, 0, -1]])), "before time 0"),
    ]
    for suffix, content, says in cases:
        with pytest.raises(readers.Invalid, match=says):
            read(tmp_path, suffix, content, *((34, 34) if suffix == ".bin" else (128, 128)))


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (TRACE.append, ("ran",))

    array = np.array([[Trap()] * 4], object)
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "TRACE", TRACE)
        np.save(buffer, array, allow_pickle=True)
    with pytest.raises(readers.Invalid, match="no array"):
        read(tmp_path, ".npy", buffer.getvalue())
    assert not TRACE


TRACE: list = []


def binning(**changes):
    kept = {
        "num_frames": 7,
        "by": "time",
        "binary": False,
        "width": 34,
        "height": 34,
        "crop": 0,
        "denoise_us": 0.0,
    }
    return Binning(**(kept | changes))


@pytest.mark.parametrize("by", ["time", "count"])
@pytest.mark.parametrize("crop", [0, 32, 9])
@pytest.mark.parametrize("denoise_us", [0.0, 8000.0])
def test_frames_are_those_of_tonic(rng, by, crop, denoise_us):
    recorded = random_events(rng, 3000, 34, 34)
    arguments = {"n_time_bins": 7} if by == "time" else {"n_event_bins": 7}
    transform = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), **arguments)
    plain = tonic.transforms.Denoise(filter_time=denoise_us)(recorded) if denoise_us else recorded
    assert len(plain) > 500 and (len(plain) < 3000) == bool(denoise_us)
    wanted = transform(plain).transpose(0, 2, 3, 1)
    if crop:
        start = (34 - crop) // 2
        wanted = wanted[:, start : start + crop, start : start + crop]
    counts = count_frames(recorded, binning(by=by, crop=crop, denoise_us=denoise_us))[0]
    assert np.array_equal(counts, wanted) and counts.dtype == np.uint8 and counts.max() > 1
    binary = count_frames(recorded, binning(by=by, crop=crop, denoise_us=denoise_us, binary=True))[0]
    assert np.array_equal(binary, wanted > 0)


def test_many_events_on_one_pixel_do_not_wrap_around():
    recorded = np.zeros(70_000, readers.EVENT)
    recorded["t"] = np.arange(70_000)
    assert count_frames(recorded, binning(num_frames=1))[0].ravel()[:2].tolist() == [255, 0]


def test_recordings_too_short_for_the_frames_are_invalid():
    recorded = np.zeros(5, readers.EVENT)
    for by in ("time", "count"):
        with pytest.raises(readers.Invalid, match="too"):
            count_frames(recorded, binning(by=by))


@pytest.mark.parametrize("binary", [False, True])
def test_frames_unpack_what_was_packed(rng, binary):
    shape = (3, 5, 7, 2)  # 210 bits: not a whole number of bytes
    wanted = rng.integers(0, 2 if binary else 256, (9, *shape)).astype(np.uint8)
    stored = np.concatenate([stored_row(frames, binary) for frames in wanted])
    frames = Frames(stored, shape, binary)
    assert stored.shape[1] == (27 if binary else 210) and frames.shape == wanted.shape and len(frames) == 9
    assert np.array_equal(np.asarray(frames), wanted) and np.array_equal(frames[3], wanted[3])
    index = np.array([8, 0, 0, 4])
    assert np.array_equal(frames[index], wanted[index]) and np.array_equal(frames[2:5], wanted[2:5])
    assert np.array_equal(frames.take(index)[1:3], wanted[index][1:3])


@pytest.mark.parametrize("frames", ["count", "binary"])
def test_nmnist_from_a_folder(tmp_path, rng, frames):
    made = write_nmnist(tmp_path, rng, 30, 10)
    config = settings(name="nmnist", dir=str(tmp_path), num_validation=10, crop=32, num_frames=6, frames=frames)
    dataset = data.load(**config)
    assert "SUBSET: 30 train and 10 test recordings of 60,000 and 10,000" in dataset.source
    assert dataset.temporal and dataset.num_classes == 10 and dataset.train.images.shape == (20, 6, 32, 32, 2)
    wanted = np.stack(
        [count_frames(one, binning(num_frames=6, crop=32, binary=frames == "binary"))[0] for one in made["Test"]]
    )
    assert np.array_equal(np.asarray(dataset.test.images), wanted)
    assert np.array_equal(dataset.test.labels, np.arange(10))
    feed = data.Feed(dataset.train, 4, 0)
    batch, indices = feed.batch(3), data.train_indices(0, 3, 20, 4)
    assert np.array_equal(batch.images, dataset.train.images[indices]) and batch.images.shape == (
        4,
        6,
        32,
        32,
        2,
    )
    on_device = data.Feed(dataset.train, 4, 0, on_device=True).batch(3)
    assert all(np.array_equal(one, other) for one, other in zip(batch, on_device, strict=True))
    scaled = data.normalize(jax.numpy.asarray(batch.images), dataset.mean, dataset.std)
    np.testing.assert_allclose(scaled, batch.images, rtol=1e-6)
    masks = [int(batch.mask.sum()) for batch in data.eval_batches(dataset.test, 4)]
    assert masks == [4, 4, 2]
    assert data.load(**config).checksum == dataset.checksum
    stored = list((tmp_path / "cache").rglob("train_images.npy"))
    assert stored[0].stat().st_size == 128 + 30 * 6 * 32 * 32 * 2 // (8 if frames == "binary" else 1)


def test_settings_and_files_decide_the_cache_entry(tmp_path, rng):
    write_nmnist(tmp_path, rng, 10, 10)
    base = {"name": "nmnist", "dir": str(tmp_path), "num_validation": 0, "num_frames": 4}
    seen = {data.load(**settings(**base)).checksum}
    for change in (
        {"num_frames": 5},
        {"crop": 32},
        {"frames": "binary"},
        {"binning": "count"},
        {"denoise_us": 9000.0},
    ):
        seen.add(data.load(**settings(**(base | change))).checksum)
    (tmp_path / "NMNIST/Train/3/00004.bin").write_bytes(nmnist_bytes(random_events(rng, 300, 34, 34)))
    seen.add(data.load(**settings(**base)).checksum)
    assert len(seen) == 7


def test_invalid_recordings_are_named_and_nothing_is_used(tmp_path, rng):
    write_nmnist(tmp_path, rng, 30, 10)
    folder = tmp_path / "NMNIST"
    recorded = random_events(rng, 50, 34, 34)
    (folder / "Train/3/00004.bin").write_bytes(nmnist_bytes(recorded[::-1]))
    (folder / "Train/5/00006.bin").write_bytes(nmnist_bytes(recorded)[:-2])
    (folder / "Test/7/00008.bin").write_bytes(nmnist_bytes(changed(recorded, x=40)))
    with pytest.raises(UserError, match="3 of the 40 recordings") as caught:
        data.load(**settings(name="nmnist", dir=str(tmp_path), num_validation=0))
    said = str(caught.value)
    for words in (
        "Train/3/00004.bin: time goes back",
        "Train/5/00006.bin: it is truncated",
        "Test/7/00008.bin: event",
    ):
        assert words in said
    assert "\n" not in said and not list((tmp_path / "cache").rglob("*.npy"))


def test_dvs_gesture_as_tonic_has_it(tmp_path, rng):
    for split, users in (("Train", 3), ("Test", 2)):
        for user in range(users):
            folder = tmp_path / f"DVSGesture/ibmGesture{split}/user0{user}_led"
            folder.mkdir(parents=True)
            for label in range(11):
                (folder / f"{label}.npy").write_bytes(gesture_bytes(random_events(rng, 200, 128, 128, 6_000_000)))
    dataset = data.load(**settings(name="dvs_gesture", dir=str(tmp_path), num_validation=11, num_frames=4))
    assert dataset.train.images.shape == (22, 4, 128, 128, 2) and len(dataset.test.labels) == 22
    assert "33 train and 22 test recordings of 1,077 and 264" in dataset.source
    assert np.array_equal(np.bincount(dataset.test.labels), [2] * 11)


def write_gesture(folder, rng):
    folder.mkdir(parents=True)
    whole = random_events(rng, 2000, 128, 128, 2_000_000)
    (folder / "user01_led.aedat").write_bytes(aedat3_bytes(whole))
    rows = [f"{label},{label * 150_000},{(label + 1) * 150_000}" for label in range(1, 12)]
    (folder / "user01_led_labels.csv").write_text("\n".join(["class,startTime_usec,endTime_usec", *rows]))
    for split in ("train", "test"):
        (folder / f"trials_to_{split}.txt").write_text("user01_led.aedat\nuser02_led.aedat\n")
    return whole


def test_dvs_gesture_as_its_authors_have_it(tmp_path, rng):
    whole = write_gesture(tmp_path / "DvsGesture", rng)
    dataset = data.load(**settings(name="dvs_gesture", dir=str(tmp_path), num_validation=0, num_frames=3))
    assert "11 train and 11 test" in dataset.source and np.array_equal(dataset.test.labels, np.arange(11))
    part = whole[(whole["t"] >= 450_000) & (whole["t"] < 600_000)]
    wanted = count_frames(part, binning(num_frames=3, width=128, height=128))[0]
    assert np.array_equal(dataset.test.images[2], wanted)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class,startTime_usec,endTime_usec\n12,0,1", "class 12"),
        ("class,startTime_usec,endTime_usec\n1,x,1", "cannot be read"),
        ("a,b\n1,2", "cannot be read"),
        ("class,startTime_usec,endTime_usec\n1,9000000,9100000", "no event between"),
    ],
)
def test_wrong_gesture_labels_are_refused(tmp_path, rng, text, says):
    write_gesture(tmp_path / "DvsGesture", rng)
    (tmp_path / "DvsGesture/user01_led_labels.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        data.load(**settings(name="dvs_gesture", dir=str(tmp_path), num_validation=0, num_frames=2))


def test_cifar10_dvs_as_its_authors_have_it(tmp_path, rng):
    for name in sets.CIFAR10_CLASSES:
        (tmp_path / name).mkdir()
        for number in range(12):
            recorded = random_events(rng, 100 + number, 128, 128, 1_300_000)
            (tmp_path / name / f"cifar10_{name}_{number}.aedat").write_bytes(aedat2_bytes(recorded))
    dataset = data.load(**settings(name="cifar10_dvs", dir=str(tmp_path), num_validation=0, num_frames=2, crop=64))
    assert len(dataset.train.labels) == 110 and dataset.test.images.shape == (10, 2, 64, 64, 2)
    found = sets.find_cifar10_dvs(tmp_path)
    assert [recording.path.stem[-3:] for recording in found.test] == ["_11"] * 10, "by number, not by letter"


def test_simulated_events_are_deterministic_and_valid():
    (images, _), _ = digits.load_images()
    made = list(saccades.events_of(images[:60], seed=0))
    for recorded in made:
        readers.check(recorded, 34, 34)
        assert recorded["t"][-1] <= 315_000
    again = list(saccades.events_of(images[40:60], seed=0, first=40))
    assert all(np.array_equal(one, other) for one, other in zip(made[40:], again, strict=True))
    other = next(saccades.events_of(images[:1], seed=1))
    assert not np.array_equal(other, made[0])
    joined = np.concatenate(made)
    assert hashlib.sha256(joined.tobytes()).hexdigest() == FROZEN
    assert 2000 < len(joined) / 60 < 6000 and 0.4 < joined["p"].mean() < 0.6
    assert np.array_equal(readers.parse_nmnist(nmnist_bytes(made[0]))["t"], made[0]["t"]), (
        "the format of N-MNIST holds them"
    )


FROZEN = "c3fdea75954d77f7fa703b691eab23a6e8065106291ffa1f00a4464f082b6774"


def test_simulated_events_follow_the_edges_of_the_motion():
    """A bright bar, moved to the left by the third saccade, brightens its left side and darkens its right."""
    bar = np.zeros((1, 8, 8))
    bar[:, :, 3:5] = 1
    (recorded,) = saccades.events_of(bar)
    last = recorded[recorded["t"] > 250_000]
    middle = last[(last["y"] > 10) & (last["y"] < 22)]
    assert np.median(middle["x"][middle["p"] == 1]) < np.median(middle["x"][middle["p"] == 0]) - 2


def test_a_still_picture_gives_noise_alone(monkeypatch):
    monkeypatch.setattr(saccades, "CORNERS", np.zeros((4, 2)))
    (recorded,) = saccades.events_of(np.ones((1, 8, 8)))
    assert 100 < len(recorded) < 300


@pytest.mark.slow
def test_saccade_digits_are_a_data_set():
    config = settings(name="saccade_digits", num_validation=100, crop=32, num_frames=5, frames="binary")
    dataset = data.load(**config)
    assert dataset.train.images.shape == (1337, 5, 32, 32, 2) and len(dataset.test.labels) == 360
    assert data.load(**config).checksum == dataset.checksum
    pictures = data.load(**settings())
    assert np.array_equal(dataset.test.labels, pictures.test.labels)


def test_event_settings_are_checked(tmp_path, rng):
    write_nmnist(tmp_path, rng, 10, 10)
    for change, says in (
        ({"binning": "x"}, "binning"),
        ({"frames": "x"}, "frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"crop": 35}, "crop"),
        ({"denoise_us": -1.0}, "denoise_us"),
        ({"source": "tfds"}, "source"),
        ({"num_frames": 500, "binning": "count"}, "too few"),
        ({"denoise_us": 0.5}, "nothing of it is left"),
    ):
        with pytest.raises(UserError, match=says):
            data.load(**settings(name="nmnist", dir=str(tmp_path), num_validation=0, **change))


def test_no_recordings_and_no_network_is_one_sentence(tmp_path):
    for name, word in (
        ("nmnist", "Train/<class>/*.bin"),
        ("dvs_gesture", "*.npy"),
        ("cifar10_dvs", "*.aedat4"),
    ):
        for folder, says in (("", "cannot be reached"), (str(tmp_path), "data.name to folder")):
            with pytest.raises(UserError, match=says) as caught:
                data.load(**settings(name=name, dir=folder))
            said = str(caught.value)
            assert word in said and str(tmp_path) in said and "\n" not in said


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("MPISJAX_MIRROR", f"http://127.0.0.1:{httpd.server_port}")
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_nmnist_is_downloaded_and_unpacked(tmp_path, server, rng, monkeypatch):
    write_nmnist(tmp_path / "made", rng, 20, 10)
    for split in ("Train", "Test"):
        archive = server / f"{split.lower()}.zip"
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in sorted((tmp_path / "made/NMNIST" / split).rglob("*.bin")):
                zipped.write(path, path.relative_to(tmp_path / "made/NMNIST"))
        digest = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(tonic.datasets.NMNIST, f"{split.lower()}_md5", digest)
    config = settings(name="nmnist", num_validation=0, num_frames=3)
    dataset = data.load(**config)
    assert "downloaded to" in dataset.source and "20 train and 10 test" in dataset.source
    for path in server.iterdir():
        path.unlink()
    assert data.load(**config).checksum == dataset.checksum, "not downloaded twice"


def test_a_wrong_event_archive_is_refused_and_never_taken_for_a_subset(tmp_path, server, rng):
    """The checksums are tonic's own here, and the served archives are not the originals."""
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(server / name, "w") as zipped:
            zipped.writestr("Train/0/00001.bin", nmnist_bytes(random_events(rng, 50, 34, 34)))
            zipped.writestr("Test/0/00001.bin", nmnist_bytes(random_events(rng, 50, 34, 34)))
    for _ in range(2):
        with pytest.raises(UserError, match="corrupted"):
            data.load(**settings(name="nmnist", num_validation=0, num_frames=3))


def test_tonic_has_what_is_downloaded():
    for kind in fetch.EVENT_CLASSES.values():
        assert hasattr(tonic.datasets, kind)


def write_unsorted(tmp_path, rng):
    """A small N-MNIST, of which one recording has an early event; returns the recording in time order."""
    write_nmnist(tmp_path, rng, 20, 10)
    recorded = random_events(rng, 200, 34, 34)
    early = np.concatenate([recorded[1:], recorded[:1]])
    (tmp_path / "NMNIST/Train/3/00004.bin").write_bytes(nmnist_bytes(early))
    return recorded


@pytest.mark.parametrize("choice", ["refuse", "sort", "skip"])
def test_recordings_out_of_order_are_refused_sorted_or_skipped(tmp_path, rng, caplog, choice):
    recorded = write_unsorted(tmp_path, rng)
    config = settings(name="nmnist", dir=str(tmp_path), num_validation=0, num_frames=3, unsorted_events=choice)
    if choice == "refuse":
        with pytest.raises(UserError, match="00004.bin: time goes back"):
            data.load(**config)
        return
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        with caplog.at_level("WARNING"):
            dataset = data.load(**config)
        (line,) = [text for text in caplog.messages if "out of order" in text]
        assert "1 recordings" in line and "Train/3/00004.bin" in line
        assert ("were sorted" if choice == "sort" else "were skipped") in line
    assert len(dataset.train.labels) == len(dataset.train.images) == (20 if choice == "sort" else 19)
    assert np.bincount(dataset.train.labels)[3] == (2 if choice == "sort" else 1)
    if choice == "sort":
        assert np.array_equal(dataset.train.images[3], count_frames(recorded, binning(num_frames=3))[0])


def test_events_in_no_frame_are_counted_in_the_log(tmp_path, rng, caplog):
    write_nmnist(tmp_path, rng, 10, 10, size=400)
    config = settings(name="nmnist", dir=str(tmp_path), num_validation=0, num_frames=300, binning="count")
    with caplog.at_level("WARNING"):
        data.load(**config)
    (line,) = [text for text in caplog.messages if "in no frame" in text]
    assert "2,000 of 8,000 events (25%)" in line
    caplog.clear()
    config["num_frames"] = 200
    with caplog.at_level("WARNING"):
        data.load(**config)
    assert not [text for text in caplog.messages if "in no frame" in text]
