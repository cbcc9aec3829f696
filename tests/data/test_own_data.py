"""One's own images, arrays and recordings: what is read, and one sentence on whatever cannot be."""

import io
import shutil

import numpy as np
import pytest
from data_helpers import aedat2_bytes, nmnist_bytes, random_events, settings
from PIL import Image

from mpisjax import data
from mpisjax.data import folders
from mpisjax.data.arrays import parse_range
from mpisjax.data.events import readers
from mpisjax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_images(folder, rng, classes=("cat", "dog"), count=10, size=(20, 12), mode="RGB", ending="png"):
    """`count` random images of each class; returns the pixels by name."""
    made = {}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{ending}")
            made[f"{name}/{number}"] = pixels
    return made


def refused(says, load, *arguments, **options):
    """The one sentence that a call is refused with."""
    with pytest.raises(UserError, match=says) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_of_the_wanted_size_are_read_as_they_are(folder, rng):
    train = write_images(folder / "train", rng, size=(16, 16))
    test = write_images(folder / "test", rng, count=3, size=(16, 16))
    dataset = data.from_folder(folder, image_size=16)
    assert np.array_equal(dataset.train.images, np.stack(list(train.values())))
    assert np.array_equal(dataset.test.images, np.stack(list(test.values())))
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10 and dataset.classes == ("cat", "dog")
    assert "20 train and 6 test" in dataset.source and "0 cat, 1 dog" in dataset.source
    assert not dataset.temporal and dataset.num_classes == 2 and len(dataset.validation.labels) == 0
    again = data.from_folder(folder, image_size=16)
    assert again.checksum == dataset.checksum and again.source == dataset.source
    by_name = data.load(**settings(name="folder", dir=str(folder), image_size=16, num_validation=4))
    assert by_name.checksum == dataset.checksum and len(by_name.validation.labels) == 4
    share = data.load(**settings(name="folder", dir=str(folder), num_validation=0, validation_share=0.3))
    assert len(share.validation.labels) == 6 and np.bincount(share.validation.labels).tolist() == [3, 3]


def test_a_folder_without_splits_is_split_by_a_fixed_seed(folder, rng):
    write_images(folder, rng, classes=("a", "b", "c"), count=20)
    dataset = data.from_folder(folder, test_share=0.25)
    assert np.bincount(dataset.train.labels).tolist() == [15] * 3
    assert np.bincount(dataset.test.labels).tolist() == [5] * 3
    assert "split by a fixed seed" in dataset.source
    other = data.from_folder(folder, test_share=0.25, split_seed=7, num_validation=3)
    assert np.array_equal(other.test.images, dataset.test.images)
    assert data.from_folder(folder, test_share=0.5).checksum != dataset.checksum
    refused("test_share", data.from_folder, folder, test_share=0.001)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_small_classes_are_in_both_splits(folder, rng, count):
    write_images(folder, rng, classes=("a", "b c", "ö"), count=count)
    write_images(folder, rng, classes=("many",), count=20)
    dataset = data.from_folder(folder, image_size=8)
    assert set(dataset.train.labels) == set(dataset.test.labels) == {0, 1, 2, 3}
    assert len(dataset.train.labels) + len(dataset.test.labels) == 20 + 3 * count
    assert "a, 1 b c, 2 many, 3 ö" in dataset.source
    shutil.rmtree(folder / "many")
    assert set(data.from_folder(folder, image_size=8, test_share=0.9).train.labels) == {0, 1, 2}


def test_a_validation_folder_is_the_validation_split_or_stands_in_for_test(folder, rng):
    for split, count in (("train", 8), ("val", 4), ("test", 2)):
        write_images(folder / split, rng, count=count)
    dataset = data.from_folder(folder)
    assert [len(s.labels) for s in (dataset.train, dataset.validation, dataset.test)] == [16, 8, 4]
    refused("validation split of its own", data.from_folder, folder, num_validation=2)
    shutil.rmtree(folder / "test")
    dataset = data.from_folder(folder)
    assert [len(s.labels) for s in (dataset.train, dataset.validation, dataset.test)] == [16, 0, 8]
    assert "the test split is val" in dataset.source


def test_a_class_may_be_called_train(folder, rng):
    write_images(folder, rng, classes=("car", "plane", "train"))
    assert data.from_folder(folder).classes == ("car", "plane", "train")


def test_numbered_classes_are_in_the_order_of_their_numbers(folder, rng):
    write_images(folder, rng, classes=tuple(map(str, range(11))), count=5)
    assert data.from_folder(folder).classes == tuple(map(str, range(11)))


def test_letterbox_keeps_all_and_crop_the_middle(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(5):
            pixels = np.zeros((20, 40), np.uint8)
            pixels[:, :10], pixels[:, 10:30], pixels[:, 30:] = 50, 100, 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    boxed = data.from_folder(folder, image_size=20)
    image = boxed.train.images[0, ..., 0]
    assert not image[:5].any() and not image[15:].any() and "letterboxed from 40 x 20 to 20 x 20" in boxed.source
    assert image[10, 1] == 50 and image[10, 10] == 100 and image[10, 18] == 150
    cropped = data.from_folder(folder, image_size=20, fit="crop")
    assert (cropped.train.images == 100).all() and "cropped from" in cropped.source
    assert data.from_folder(folder, image_size=0).train.images.shape[1:] == (20, 40, 1)
    Image.fromarray(pixels[:10]).save(folder / "a" / "odd.png")
    said = refused("40 x 10", data.from_folder, folder, image_size=0)
    assert "a/odd.png" in said and "data.image_size" in said


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "bmp", "webp", "PNG"])
def test_every_format_is_read(folder, rng, ending):
    write_images(folder, rng, ending=ending)
    assert len(data.from_folder(folder).train.labels) == 16


def one_more(folder, image, **options):
    """The folder's data set with an image beside its own, which is the first of the train split."""
    image.save(folder / "train" / "cat" / "!.png", **options)
    return data.from_folder(folder, image_size=0).train.images[0]


def test_depths_alpha_and_orientation_mean_what_they_say(folder, rng):
    for split in ("train", "test"):
        write_images(folder / split, rng, mode="L", size=(6, 6))
    deep = np.array([[0, 257, 32896, 65535]] * 6, np.uint16).repeat(2, 1)[:, :6]
    assert np.array_equal(one_more(folder, Image.fromarray(deep))[0, ::2, 0], [0, 1, 128])
    grey = Image.fromarray(np.full((6, 6), 200, np.uint8))
    grey.putalpha(Image.fromarray(np.tri(6, dtype=np.uint8) * 255))
    assert np.array_equal(one_more(folder, grey)[..., 0], np.tri(6, dtype=np.uint8) * 200)
    bits = Image.fromarray(np.tri(6, dtype=bool))
    assert np.array_equal(one_more(folder, bits)[..., 0], np.tri(6, dtype=np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright = np.arange(36, dtype=np.uint8).reshape(6, 6)
    turned = one_more(folder, Image.fromarray(upright), exif=exif)
    assert np.array_equal(turned[..., 0], upright[::-1, ::-1])


def test_sixteen_bits_are_scaled_by_the_range_that_is_given(folder):
    pixels = np.full((6, 6), 4095, np.uint16)
    pixels[0] = 0
    Image.fromarray(pixels).save(folder / "a.png")
    image, size = data.read_image(folder / "a.png", image_size=0, value_range=(0, 4095))
    assert size == (6, 6) and (image[0] == 0).all() and (image[1:] == 255).all()
    with pytest.raises(ValueError, match="0 to 4095, outside of data.value_range, 0 to 1000"):
        data.read_image(folder / "a.png", image_size=0, value_range=(0, 1000))


def test_one_image_of_another_kind_is_named_converted_or_left_out(folder, rng):
    write_images(folder, rng, mode="L")
    write_images(folder, rng, classes=("dog",), count=1)  # dog/0.png is now in colour
    said = refused("dog/0.png is in colour, while 19 other images are grey", data.from_folder, folder)
    assert "data.color" in said and "data.invalid" in said
    for color, channels in (("grey", 1), ("rgb", 3)):
        dataset = data.from_folder(folder, color=color)
        assert dataset.train.images.shape[-1] == channels
        assert len(dataset.train.labels) + len(dataset.test.labels) == 20
    skipped = data.from_folder(folder, invalid="skip")
    assert len(skipped.train.labels) + len(skipped.test.labels) == 19
    assert "1 images left out (dog/0.png: it is in colour" in skipped.source


def spoil(folder, name, content=b"", directory=False):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if directory else path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cat/broken.png", b"\x89PNG\r\n\x1a\n nonsense", "cannot be read as an image"),
        ("cat/empty.png", b"", "it is empty"),
        ("cat/notes.txt", b"notes", "none of .png"),
        ("loose.png", b"x", "no class folder"),
        ("cat/nested", None, "a folder within a class"),
        ("bird", None, "no file that can be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_or_left_out(folder, rng, name, content, says):
    write_images(folder, rng)
    spoil(folder, name, content or b"", directory=content is None)
    said = refused(says, data.from_folder, folder)
    assert name in said and "data.invalid to skip" in said
    dataset = data.from_folder(folder, invalid="skip")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 20 and dataset.classes == ("cat", "dog")
    assert f"left out ({name}: " in dataset.source


def test_a_broken_link_is_named(folder, rng):
    write_images(folder, rng)
    (folder / "dog" / "link.png").symlink_to(folder / "absent.png")
    assert "dog/link.png" in refused("broken link", data.from_folder, folder)


def test_a_truncated_image_is_named(folder, rng):
    write_images(folder, rng, ending="jpg", size=(60, 60))
    content = (folder / "dog/3.jpg").read_bytes()
    (folder / "dog/3.jpg").write_bytes(content[: len(content) // 2])
    assert "dog/3.jpg" in refused("cannot be read as an image", data.from_folder, folder)


def test_hidden_files_are_left_out_and_counted(folder, rng):
    write_images(folder, rng)
    for name in (".DS_Store", "cat/._0.png", "dog/.hidden/x.png"):
        spoil(folder, name, b"x")
    dataset = data.from_folder(folder)
    assert dataset.classes == ("cat", "dog") and "3 hidden files left out" in dataset.source


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_in_one_split_alone_is_named_or_left_out(folder, rng, split):
    for part in ("train", "test"):
        write_images(folder / part, rng, classes=("a", "c"))
    write_images(folder / split, rng, classes=("b",))
    other = "test" if split == "train" else "train"
    assert str(folder) in refused(f"class 'b' has no {other} example", data.from_folder, folder)
    dataset = data.from_folder(folder, invalid="skip")
    assert dataset.classes == ("a", "c") and np.bincount(dataset.train.labels).tolist() == [10, 10]
    assert "1 left out, in one split alone: b" in dataset.source


def test_a_class_whose_images_are_all_broken_goes_with_them(folder, rng):
    write_images(folder, rng, classes=("a", "b", "c"))
    for path in (folder / "b").iterdir():
        path.write_bytes(b"nonsense")
    dataset = data.from_folder(folder, invalid="skip")
    assert dataset.classes == ("a", "c") and set(dataset.train.labels) == {0, 1}


def test_folders_that_cannot_be_meant_are_refused(folder, rng):
    (folder / "empty").mkdir()
    (folder / "file").write_bytes(b"x")
    write_images(folder / "one", rng, classes=("a",))
    write_images(folder / "two", rng)
    for name, says in (
        ("absent", "does not exist"),
        ("file", "is no folder"),
        ("empty", "no such files.*train/CLASS"),
        ("one", "at least 2"),
        ("one/a", "no class folder"),
    ):
        refused(says, data.from_folder, folder / name)
    for changes, says in (
        ({"fit": "stretch"}, "data.fit"),
        ({"color": "blue"}, "data.color"),
        ({"crop": 3}, "event sets"),
        ({"num_validation": 99}, "num_validation"),
        ({"dir": ""}, "data.dir is empty"),
    ):
        config = settings(**({"name": "folder", "dir": str(folder / "two"), "num_validation": 0} | changes))
        refused(says, data.load, **config)
    refused("data.value_range", parse_range, "1,0")


@pytest.mark.parametrize("name", ["digits", "saccade_digits", "fashion_mnist", "cifar10", "nmnist"])
def test_a_folder_that_the_data_set_does_not_use_is_refused(folder, rng, name):
    write_images(folder, rng)
    said = refused("data.name to folder", data.load, **settings(name=name, dir=str(folder)))
    assert str(folder) in said and name in said


def test_prepared_data_elsewhere_does_not_stand_in_for_a_folder(tmp_path, folder, rng):
    write_images(folder, rng)
    place = tmp_path / "home/tensorflow_datasets/fashion_mnist/3.0.1"
    place.mkdir(parents=True)
    (place / "dataset_info.json").write_text("{}")
    refused("data.name to folder", data.load, **settings(name="fashion_mnist", dir=str(folder)))
    refused("data.source is 'download'", data.load, **settings(name="mnist", dir=str(folder), source="download"))


def test_arrays_in_memory(rng):
    x, y = rng.integers(0, 256, (30, 5, 6), np.uint8), np.array(["no", "yes", "perhaps"])[np.arange(30) % 3]
    dataset = data.from_arrays(x, y, num_validation=3)
    assert dataset.classes == ("no", "perhaps", "yes")
    sizes = [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [21, 3, 6] and "split by a fixed seed" in dataset.source
    names = {image.tobytes(): name for image, name in zip(x, y, strict=True)}
    for split in (dataset.train, dataset.validation, dataset.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert names[image.tobytes()] == dataset.classes[label]
    given = data.from_arrays(x, [5, 1, 7] * 10, x[:3], [1, 5, 7])
    assert given.classes == ("1", "5", "7") and given.test.labels.tolist() == [0, 1, 2]
    assert given.train.labels[:3].tolist() == [1, 0, 2] and given.train.images.shape == (30, 5, 6, 1)
    feed = data.Feed(given.train, 10, 0)
    assert feed.batch(0).images.shape == (10, 5, 6, 1)


def test_floats_are_scaled_by_their_range():
    x = np.linspace(-1, 1, 256).repeat(4).reshape(16, 8, 8).astype(np.float32)
    dataset = data.from_arrays(x, np.arange(16) % 2, value_range=(-1, 1), test_share=0.5)
    whole = np.sort(np.concatenate([dataset.train.images, dataset.test.images]).ravel())
    assert np.array_equal(whole, np.arange(256).repeat(4))
    refused("from -1 to 1: say which", data.from_arrays, x, np.arange(16) % 2)
    refused("outside of data.value_range, 0 to 1", data.from_arrays, x, np.arange(16) % 2, value_range=(0, 1))
    x[3, 3, 3] = np.nan
    refused("x holds values that are no finite numbers", data.from_arrays, x, np.arange(16) % 2, value_range=(-1, 1))


def test_truth_values_are_black_and_white(rng):
    x = rng.integers(0, 2, (20, 8, 8)).astype(bool)
    images = data.from_arrays(x, np.arange(20) % 2, x[:4], [0, 1, 0, 1]).train.images
    assert np.array_equal(images[..., 0], 255 * x.astype(np.uint8))


def test_frames_are_a_temporal_data_set(rng):
    x = rng.integers(0, 3, (12, 4, 6, 6, 2), np.uint8)
    dataset = data.from_arrays(x, np.arange(12) % 2, validation_share=0.2)
    assert dataset.temporal and dataset.mean == (0.0, 0.0) and dataset.train.images.shape[1:] == (4, 6, 6, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": np.zeros((20, 784), np.uint8)}, r"\[20, 784\]: give images"),
        ({"x": np.zeros((20, 3, 32, 32), np.uint8)}, "channels last"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, "give images"),
        ({"x": [np.zeros((8, 8)), np.zeros((9, 8))] * 10}, "give all examples one shape"),
        ({"x": np.zeros((19, 8, 8), np.uint8)}, "19 examples and y 20"),
        ({"y": np.eye(20)}, "argmax"),
        ({"y": np.zeros(20)}, "astype"),
        ({"y": np.zeros(20, int)}, "at least 2"),
        ({"y": [None] * 20}, "integers or strings"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8)}, "give both"),
        ({"x_test": np.zeros((4, 9, 8), np.uint8), "y_test": [0, 1, 0, 1]}, "give both the same"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8), "y_test": ["0", "1", "0", "1"]}, "both numbers or both strings"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8), "y_test": [0, 1, 0, 2]}, "class '2' has no train"),
        ({"num_validation": 16}, "num_validation"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_meant_are_refused(change, says):
    arrays = {"x": np.zeros((20, 8, 8), np.uint8), "y": np.arange(20) % 2}
    refused(says, data.from_arrays, **(arrays | change))


def test_a_class_in_one_split_alone_is_left_out_of_arrays():
    x = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)
    dataset = data.from_arrays(x, [0, 1, 2, 0, 1, 2], x[:2], [0, 2], invalid="skip")
    assert dataset.classes == ("0", "2") and dataset.train.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(dataset.train.images[..., 0], x[[0, 2, 3, 5]])


def test_an_npz_file(folder, rng):
    x, y = rng.uniform(0, 1, (30, 8, 8, 3)), np.array(["a", "b"])[np.arange(30) % 2]
    path = folder / "mine.npz"
    np.savez(path, x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    config = settings(name="arrays", dir=str(path), num_validation=4, value_range=(0, 1))
    dataset = data.load(**config)
    assert dataset.classes == ("a", "b") and str(path) in dataset.source and len(dataset.test.labels) == 10
    assert np.array_equal(dataset.test.images, np.rint(x[20:] * 255))
    np.savez(path, x_train=x, y_train=y)
    assert "x_test, y_test" in refused("has no x_test", data.load, **config)
    np.savez(path, x_train=x, y_train=np.array(["a", 1], object), x_test=x, y_test=y)
    refused(r"astype\(str\)", data.load, **config)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[:100], whole[:-30]):
        path.write_bytes(content)
        assert str(path) in refused("cannot be read", data.load, **config)
    np.save(folder / "one.npy", x)
    refused("x_train", data.load, **settings(name="arrays", dir=str(folder / "one.npy")))
    refused("which is a folder", data.load, **settings(name="arrays", dir=str(folder)))
    refused("not there", data.load, **settings(name="arrays", dir=str(folder / "absent.npz")))


def structured(recorded):
    buffer = io.BytesIO()
    fields = [("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?"), ("extra", "<f4")]
    array = np.zeros(len(recorded), fields)
    for name in "xytp":
        array[name] = recorded[name]
    np.save(buffer, array)
    return buffer.getvalue()


FORMATS = {".bin": nmnist_bytes, ".aedat": aedat2_bytes, ".npy": structured}


def write_recordings(folder, rng, ending, classes=("left", "right"), count=5, size=(30, 20)):
    made = []
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            recorded = random_events(rng, 300, *size)
            recorded["x"][0], recorded["y"][0] = size[0] - 1, size[1] - 1
            (folder / name / f"{number}{ending}").write_bytes(FORMATS[ending](recorded))
            made.append(recorded)
    return made


@pytest.mark.parametrize("ending", FORMATS)
def test_recordings_of_every_format(folder, rng, ending):
    pytest.importorskip("tonic")
    made = write_recordings(folder / "train", rng, ending)
    write_recordings(folder / "test", rng, ending, count=2)
    dataset = data.from_recordings(folder, num_frames=4)
    assert dataset.temporal and dataset.train.images.shape == (10, 4, 20, 30, 2)
    assert "10 train and 4 test; sensor 30 x 20, found" in dataset.source and "0 left, 1 right" in dataset.source
    total = np.asarray(dataset.train.images[3]).sum(0)
    wanted = np.zeros((20, 30, 2))
    np.add.at(wanted, (made[3]["y"], made[3]["x"], made[3]["p"]), 1)
    assert 0 <= (wanted - total).sum() <= 8 and (total <= wanted).all()  # a few after the last frame's end
    config = settings(name="recordings", dir=str(folder), num_frames=4, num_validation=2, sensor_size=(34, 34))
    given = data.load(**config)
    assert given.train.images.shape == (8, 4, 34, 34, 2) and "found" not in given.source
    config["sensor_size"] = (29, 34)
    refused("outside of the 29 x 34 sensor", data.load, **config)
    refused("data.sensor_size", folders.parse_sensor, "29")
    config |= {"sensor_size": None, "crop": 25}
    refused("data.crop", data.load, **config)


def test_invalid_recordings_are_named_or_left_out(folder, rng, caplog):
    pytest.importorskip("tonic")
    write_recordings(folder, rng, ".npy", count=10)
    (folder / "left/2.npy").write_bytes(b"nonsense")
    config = settings(name="recordings", dir=str(folder), num_frames=4, num_validation=0)
    assert "data.invalid to skip" in refused("left/2.npy: it is no array", data.load, **config)
    config["invalid"] = "skip"
    with caplog.at_level("WARNING"):
        dataset = data.load(**config)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 19 and "1 recordings left out" in dataset.source
    assert any("left/2.npy" in text and "skipped" in text for text in caplog.messages)


def test_structured_arrays_without_the_fields_are_invalid(folder):
    for dtype in ([("x", int), ("y", int), ("t", int)], [("x", "U3"), ("y", int), ("t", int), ("p", int)]):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(3, dtype))
        with pytest.raises(readers.Invalid):
            readers.parse_array(buffer.getvalue())
