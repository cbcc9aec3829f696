"""The genuine data, bit by bit, where `MPISJAX_TEST_DATA` names a folder that has it.

The folder holds fashion_mnist/*.gz, cifar100/cifar-100-binary.tar.gz, cifar10/cifar-10-binary.tar.gz (which may be a
subset) and nmnist/NMNIST/{Train,Test}/<class>/*.bin (which may be a subset).
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import settings

from mpisjax import data
from mpisjax.data.events import readers, sets
from mpisjax.data.events.frames import Binning, count_frames

FOLDER = os.environ.get("MPISJAX_TEST_DATA", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="MPISJAX_TEST_DATA names no folder with the real data, so it was not compared"
)

# SHA-256 of pixels (in the order N, H, W, C) and of labels (as bytes), made from the original arrays without this
# package.
FASHION_MNIST = {
    "train": (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    ),
    "test": (
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}
CIFAR100_TRAIN = (
    "4e457917601a66aed021f5fa37957b56c6319557c0a8ed5484de3c390af45430",
    "9f11b9f97aad759ba6df0a33e3218b01d8deaf4ed3a14aa1185d69b9ad7ebcb3",
)
# Of each image's bytes and label, sorted: the test split has more than one order.
CIFAR100_TEST_SORTED = "bfd0811d0a448501c2e091bfa954a54d32799036ebc39230bb71e2f98e1b63c8"
CIFAR10_FIRST_2000_TEST = "9016eaefe23ba13c240079c950717799ae4dc1a06c5058f28a2cc9611aac17e2"


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def load(name, **changes):
    if not (Path(FOLDER) / name).is_dir():
        pytest.skip(f"{FOLDER} has no {name}, so it was not compared")
    return data.load(**settings(name=name, dir=FOLDER, num_validation=0, **changes))


def test_fashion_mnist():
    dataset = load("fashion_mnist")
    assert "complete: 60,000 train and 10,000 test" in dataset.source
    for name, sums in FASHION_MNIST.items():
        split = getattr(dataset, name)
        assert (sha(split.images), sha(split.labels.astype(np.uint8))) == sums


def test_cifar100():
    dataset = load("cifar100")
    assert "complete: 50,000 train and 10,000 test" in dataset.source
    assert (sha(dataset.train.images), sha(dataset.train.labels.astype(np.uint8))) == CIFAR100_TRAIN
    pairs = zip(dataset.test.images, dataset.test.labels, strict=True)
    rows = sorted(image.tobytes() + bytes([label]) for image, label in pairs)
    assert hashlib.sha256(b"".join(rows)).hexdigest() == CIFAR100_TEST_SORTED
    np.testing.assert_allclose(dataset.mean, (0.5071, 0.4865, 0.4409), atol=5e-5)
    assert data.class_counts(dataset.train.labels, 100) == [500] * 100


def test_cifar10():
    dataset = load("cifar10")
    if "SUBSET" not in dataset.source:
        np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=5e-5)
    else:
        assert sha(dataset.test.images[:2000]) == CIFAR10_FIRST_2000_TEST


def test_every_nmnist_recording_against_tonic():
    tonic = pytest.importorskip("tonic")
    found = sets.find_nmnist(Path(FOLDER) / "nmnist")
    if found is None:
        pytest.skip(f"{FOLDER} has no nmnist, so it was not compared")
    dtype = tonic.datasets.NMNIST.dtype
    to_frame = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=10)
    binning = Binning(10, "time", False, 34, 34, 0, 0.0)
    for place, recording in enumerate([*found.train, *found.test]):
        assert recording.label == int(recording.path.parent.name)
        got = readers.read(recording, 34, 34)
        wanted = tonic.io.read_mnist_file(recording.path, dtype)
        for name in "xytp":
            assert np.array_equal(got[name], wanted[name]), recording.path
        if place % 10 == 0:
            assert np.array_equal(count_frames(got, binning)[0], to_frame(wanted).transpose(0, 2, 3, 1)), recording.path
    dataset = load("nmnist", num_frames=10, frames="binary", crop=32)
    assert f"{len(found.train):,} train and {len(found.test):,} test recordings" in dataset.source
