"""Splits, order, feeding and augmentation."""

import gzip
import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from data_helpers import settings, write_idx

from mpisjax import data
from mpisjax.data import dataset
from mpisjax.data.augment import _turned as turned
from mpisjax.errors import UserError

pytestmark = pytest.mark.unoptimized


def test_digits_are_complete_and_split_by_fixed_seeds():
    first, again = data.load(**settings()), data.load(**settings(num_validation=0, split_seed=9))
    assert first.checksum == again.checksum == "3b7e6e8944138439e793b89a10ebfc921cc85f480adf4956d95a1b8e8190ed5b"
    assert first.train.images.shape == (1337, 8, 8, 1) and first.train.images.dtype == np.uint8
    assert first.validation.images.shape == (100, 8, 8, 1) and first.test.images.shape == (360, 8, 8, 1)
    assert np.array_equal(first.test.images, again.test.images), "the test split must not depend on split_seed"
    assert set(np.unique(first.train.images)) <= {round(level * 255 / 16) for level in range(17)}
    assert sum(map(sum, data.summary(first)["class_counts"].values())) == 1797
    assert first.train.labels.dtype == np.int32
    scaled = np.asarray(first.train.images) / 255
    np.testing.assert_allclose([first.mean[0], first.std[0]], [scaled.mean(), scaled.std()], rtol=1e-9)


def test_kept_digits_need_no_scikit_learn(tmp_path, monkeypatch):
    first = data.load("digits", cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # its import now fails
    again = data.load("digits", cache_dir=tmp_path)
    assert again.checksum == first.checksum and again.source == first.source
    np.testing.assert_array_equal(again.train.images[:], first.train.images[:])
    with pytest.raises(ImportError):
        data.load("digits", cache_dir=tmp_path / "other")


def test_validation_is_disjoint_balanced_and_a_function_of_split_seed():
    labels = np.repeat(np.arange(10), 30).astype(np.int32)
    kept, held = dataset.hold_out(labels, 50, 3)
    assert sorted([*kept, *held]) == list(range(300))
    assert data.class_counts(labels[held], 10) == [5] * 10
    assert np.array_equal(held, dataset.hold_out(labels, 50, 3)[1])
    assert not np.array_equal(held, dataset.hold_out(labels, 50, 4)[1])
    for count in (-1, 300):
        with pytest.raises(UserError, match="num_validation"):
            dataset.hold_out(labels, count, 0)


def test_an_epoch_is_a_permutation_without_the_rest():
    steps = [data.train_indices(5, step, 103, 10) for step in range(20)]
    for epoch in (steps[:10], steps[10:]):
        assert len(set(np.concatenate(epoch))) == 100
    assert not np.array_equal(np.concatenate(steps[:10]), np.concatenate(steps[10:]))
    assert np.array_equal(steps[13], data.train_indices(5, 13, 103, 10)), "out of order must not matter"
    assert not np.array_equal(steps[0], data.train_indices(6, 0, 103, 10))
    with pytest.raises(UserError, match="batch_size"):
        data.train_indices(0, 0, 5, 6)
    with pytest.raises(UserError, match="seed"):
        data.train_indices(-1, 0, 5, 5)


def test_the_order_is_frozen():
    """Checkpoints resume in the middle of an epoch, so the order may not change from version to version."""
    assert data.train_indices(0, 0, 1000, 5).tolist() == EXPECTED_ORDER


EXPECTED_ORDER = [998, 162, 670, 664, 185]


@pytest.mark.parametrize("on_device", [False, True])
def test_feed_gives_what_train_indices_say(on_device):
    split = data.load(**settings()).train
    feed = data.Feed(split, 64, seed=2, on_device=on_device)
    assert feed.steps_per_epoch == 1337 // 64 and feed.on_device == on_device
    for step in (0, 21, 3):
        batch, indices = feed.batch(step), data.train_indices(2, step, 1337, 64)
        assert np.array_equal(batch.images, split.images[indices]) and batch.images.dtype == jnp.uint8
        assert np.array_equal(batch.labels, split.labels[indices]) and batch.labels.dtype == jnp.int32
        assert np.array_equal(batch.mask, np.ones(64))


@pytest.mark.parametrize("on_device", [False, True])
def test_batches_do_not_depend_on_sharding_and_travel_explicitly(on_device):
    split = data.load(**settings()).train
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    plain, sharded = data.Feed(split, 64, 0), data.Feed(split, 64, 0, sharding, on_device=on_device)
    sharded.batch(0)
    with jax.transfer_guard("disallow"):
        batch = sharded.batch(1)
    assert np.array_equal(plain.batch(1).images, batch.images)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in batch)


TWO_DEVICES = """
import jax, numpy as np
from data_helpers import settings
from mpisjax import data
from mpisjax.errors import UserError
assert len(jax.devices()) == 2
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
changes = data.Augmentation(flip=True, rotate=9.0, zoom=0.1, shift=2, cutout=3)
split = data.load(**settings()).train
def inputs(key, batch):
    images = data.augment(key, batch.images, changes)
    one_hot = jax.nn.one_hot(batch.labels, 10)
    return images, *data.mixup(key, data.normalize(images, (0.5,), (0.3,)), one_hot, 0.5)
inputs = jax.jit(inputs)
for on_device in (False, True):
    one, two = data.Feed(split, 32, 0), data.Feed(split, 32, 0, sharding, on_device=on_device)
    for step in range(3):
        alone, shared = (jax.block_until_ready(inputs(jax.random.key(step), feed.batch(step))) for feed in (one, two))
        assert len(two.batch(step).images.sharding.device_set) == 2
        assert all(np.array_equal(a, b) for a, b in zip(alone, shared))
for one, two in zip(data.eval_batches(split, 32), data.eval_batches(split, 32, sharding)):
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
import sys
assert not {"tonic", "tensorflow_datasets", "tensorflow"} & set(sys.modules), "imported only where needed"
try:
    data.Feed(split, 31, 0, sharding)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_order_and_augmentation_do_not_depend_on_the_number_of_devices():
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "refused: a batch size of 31 cannot be shared by 2 devices" in done.stdout


def test_eval_batches_cover_everything_once():
    split = data.load(**settings()).test
    batches = list(data.eval_batches(split, 100))
    assert [int(b.mask.sum()) for b in batches] == [100, 100, 100, 60]
    assert np.array_equal(np.concatenate([b.images for b in batches])[:360], split.images)
    assert np.array_equal(np.concatenate([b.labels for b in batches])[:360], split.labels)
    assert all(b.images.shape == (100, 8, 8, 1) for b in batches) and not batches[-1].images[60:].any()
    with pytest.raises(UserError):
        list(data.eval_batches(split, 0))


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 2), np.uint8)
    mean, std = (0.4, 0.6), (0.2, 0.3)
    got = data.normalize(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(got, (images / 255 - np.array(mean)) / np.array(std), atol=1e-5)
    assert got.dtype == jnp.float32


def one(**kinds):
    return data.Augmentation(**kinds)


def test_flip_and_shift_move_pixels_and_nothing_else():
    image = np.random.default_rng(0).integers(1, 256, (1, 6, 7, 3), np.uint8)
    images = np.repeat(image, 200, 0)
    flipped = np.asarray(data.augment(jax.random.key(0), jnp.asarray(images), one(flip=True)))
    mirrored = (flipped == image[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == image).all((1, 2, 3)) | mirrored).all() and 60 < mirrored.sum() < 140
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + 6, j : j + 7].tobytes() for i in range(5) for j in range(5)}
    shifted = np.asarray(data.augment(jax.random.key(1), jnp.asarray(images), one(shift=2)))
    seen = {sample.tobytes() for sample in shifted}
    assert seen <= windows and len(seen) == 25


def test_turning_is_bilinear_interpolation_about_the_centre():
    image = np.random.default_rng(0).uniform(0, 1, (7, 10, 2)).astype(np.float32)
    angle, size = 0.4, 1.3
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / size  # of (row, column)
    middle = np.array([3.0, 4.5])
    wanted = [
        scipy.ndimage.affine_transform(image[..., c], back, middle - back @ middle, order=1, mode="grid-constant")
        for c in range(2)
    ]
    got = turned(jnp.asarray(image), angle, size)
    np.testing.assert_allclose(got, np.stack(wanted, -1), atol=1e-5)
    square = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)  # three frames
    np.testing.assert_array_equal(turned(jnp.asarray(square), np.pi / 2, 1.0), np.rot90(square, 1, (1, 2)))


def test_turning_and_zooming_stay_within_their_bounds():
    line = np.zeros((200, 41, 41, 1), np.uint8)
    line[:, 20, 10:31] = 255  # 21 pixels long, level
    for kinds, angles, lengths in (
        ({"rotate": 30.0}, (20.0, 30.0), (19.0, 22.5)),
        ({"zoom": 0.5}, (0.0, 0.5), (27.0, 32.5)),
    ):
        moved = np.asarray(data.augment(jax.random.key(0), jnp.asarray(line), one(**kinds)), np.float64)[..., 0]
        rows, columns = np.meshgrid(np.arange(41) - 20, np.arange(41) - 20, indexing="ij")
        total = moved.sum((1, 2))
        xx, yy, xy = ((moved * m).sum((1, 2)) / total for m in (columns**2, rows**2, rows * columns))
        angle = np.abs(np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2))
        length = np.sqrt(12 * (xx + yy))
        assert angles[0] <= angle.max() <= angles[1] + 0.5
        assert lengths[0] <= length.max() <= lengths[1]
        assert (length.min() > 19.0) if "rotate" in kinds else (13.5 < length.min() < 15.0)


def test_cutout_blanks_one_square():
    images = jnp.full((100, 8, 8, 1), 9, jnp.uint8)
    blanked = np.asarray(data.augment(jax.random.key(0), images, one(cutout=4)))[..., 0] == 0
    rows, columns = blanked.any(2).sum(1), blanked.any(1).sum(1)
    assert np.array_equal(blanked.sum((1, 2)), rows * columns) and rows.max() == columns.max() == 4
    assert rows.min() >= 2 and columns.min() >= 2


def test_events_share_one_draw_and_place_decides_the_draw():
    config = one(flip=True, rotate=20.0, zoom=0.2, shift=3, cutout=3)
    augment = jax.jit(lambda key, images: data.augment(jax.random.key(key), images, config))
    frame = np.random.default_rng(0).integers(1, 256, (12, 1, 9, 9, 2), np.uint8)
    moved = np.asarray(augment(4, np.repeat(frame, 5, 1)))
    assert (moved == moved[:, :1]).all() and not (moved == frame).all()
    alone = np.asarray(augment(4, frame[:, 0]))
    assert np.array_equal(alone, moved[:, 0]), "the same draw for frames and for images"
    half = np.asarray(augment(4, frame[:6, 0]))
    assert np.array_equal(half, alone[:6])
    assert not np.array_equal(alone, augment(5, frame[:, 0]))


def test_nothing_asked_nothing_done_and_float_works_inside_jit():
    images = jnp.linspace(0, 1, 2 * 5 * 5).reshape(2, 5, 5, 1)
    assert data.augment(jax.random.key(0), images, one()) is images
    moved = jax.jit(lambda k, x: data.augment(k, x, one(shift=1)))(jax.random.key(0), images)
    assert moved.dtype == images.dtype


def test_mixup_keeps_targets_a_distribution():
    images, one_hot = jnp.eye(6)[:, :, None], jnp.eye(6)
    mixed, targets = data.mixup(jax.random.key(1), images, one_hot, 1.0)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixed[..., 0], targets, rtol=1e-6)
    assert 0 < float(targets[0, 0]) < 1
    assert data.mixup(jax.random.key(1), images, one_hot, 0.0)[0] is images


def test_idx_files_plain_or_gzipped(tmp_path):
    rng = np.random.default_rng(0)
    arrays = write_idx(tmp_path / "fashion_mnist", rng, 30, 20)
    config = settings(name="fashion_mnist", dir=str(tmp_path), num_validation=0)
    dataset = data.load(**config)
    assert np.array_equal(dataset.train.images[..., 0], arrays["train"][0])
    assert np.array_equal(dataset.test.labels, arrays["test"][1])
    for path in (tmp_path / "fashion_mnist").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert data.load(**config).checksum == dataset.checksum
    assert str(tmp_path) in dataset.source


def hand_made(**changes):
    """A data set of 20 images of 10 classes, with changes by field, `labels` and `images` being those of train."""
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
    train = data.Split(changes.pop("images", images), changes.pop("labels", labels))
    other = data.Split(images, labels)
    fields = {"mean": (0.5,), "std": (0.3,), "temporal": False, "source": "made up", "checksum": ""}
    return data.DataSet(
        **{"name": "mine", "num_classes": 10, "train": train, "validation": other, "test": other} | fields | changes
    )


def test_what_a_data_set_holds_is_checked():
    whole = hand_made()
    assert whole.train.labels.dtype == np.int32
    for changes, says in (
        ({"labels": np.arange(20) % 10 + 1}, "train labels of mine go up to 10.* 0 to 9"),
        ({"labels": np.arange(20) % 10 - 1}, "from -1"),
        ({"labels": np.arange(19) % 10}, "20 images and 19 labels"),
        ({"labels": np.zeros(20)}, "float64"),
        ({"labels": np.zeros((20, 10), np.int32)}, "one class an image"),
        ({"images": np.zeros((20, 8, 8, 1))}, "float64"),
        ({"images": np.zeros((20, 8, 8), np.uint8)}, "H, W, C"),
        ({"images": None}, "NoneType"),
        ({"images": np.zeros((20, 9, 8, 1), np.uint8)}, "validation images"),
        ({"temporal": True}, "temporal"),
        ({"mean": (np.nan,)}, "mean"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.0,)}, "above 0"),
        ({"num_classes": 9}, "up to 9"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            hand_made(**changes)
        assert "\n" not in str(caught.value)


def test_load_has_the_defaults_of_the_settings():
    from mpisjax import configuration

    asked = configuration.base().data.to_dict()
    asked.pop("augment")
    taken = {name: p.default for name, p in inspect.signature(data.load).parameters.items()}
    assert taken.pop("name") is inspect.Parameter.empty
    assert taken | {"name": "digits", "value_range": "", "sensor_size": ""} == asked
