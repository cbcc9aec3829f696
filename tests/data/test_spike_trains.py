"""SHD and SSC, from small files made in their format: the sets themselves were not at hand."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import settings, write_spike_trains

from mpisjax import data
from mpisjax.data.events import readers, sets
from mpisjax.errors import UserError

tonic = pytest.importorskip("tonic")
h5py = pytest.importorskip("h5py")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "own"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_shd(folder, rng):
    labels = [n % 20 for n in range(40)]
    return write_spike_trains(folder / "shd_train.h5", rng, labels), write_spike_trains(
        folder / "shd_test.h5", rng, labels[:20]
    )


@pytest.mark.parametrize("place", ["", "SHD"])
def test_shd_is_read_as_tonic_reads_it(folder, rng, place):
    write_shd(folder / place, rng)
    config = settings(name="shd", dir=str(folder), num_frames=10, num_validation=4)
    dataset = data.load(**config)
    assert dataset.train.images.shape == (36, 10, 1, 1, 700) and dataset.temporal and dataset.num_classes == 20
    assert "40 train and 20 test recordings of 8,156 and 2,264" in dataset.source
    assert np.array_equal(dataset.test.labels, np.arange(20))
    transform = tonic.transforms.ToFrame(sensor_size=(700, 1, 1), n_time_bins=10)
    path = next(folder.rglob("shd_test.h5"))
    with h5py.File(path) as file:
        for row in (0, 7, 19):  # as tonic.datasets.SHD.__getitem__ does
            spikes = tonic.io.make_structured_array(
                file["spikes/times"][row].astype(np.float64) * 1e6,
                file["spikes/units"][row],
                1,
                dtype=tonic.datasets.SHD.dtype,
            )
            spikes["p"] = 0
            wanted = transform(spikes)[:, 0]  # [time, channels]
            assert np.array_equal(dataset.test.images[row][:, 0, 0], wanted) and wanted.sum() > 150
    batch = data.Feed(dataset.train, 6, 0).batch(0)
    assert data.prepare_images(batch.images, dataset).shape == (10, 6, 1, 1, 700)


def test_ssc_comes_with_a_validation_split(folder, rng):
    for split, labels in (("train", [0, 34, 5, 5]), ("valid", [34, 5]), ("test", [0, 5, 34])):
        write_spike_trains(folder / f"ssc_{split}.h5", rng, labels)
    dataset = data.load(**settings(name="ssc", dir=str(folder), num_frames=3, num_validation=0))
    assert [len(s.labels) for s in (dataset.train, dataset.validation, dataset.test)] == [4, 2, 3]
    assert dataset.validation.labels.tolist() == [34, 5] and dataset.num_classes == 35
    assert len(np.asarray(dataset.validation.images[:])) == 2
    with pytest.raises(UserError, match="validation split of its own"):
        data.load(**settings(name="ssc", dir=str(folder), num_frames=3, num_validation=1))


def test_damaged_files_are_refused(folder, rng):
    write_shd(folder, rng)
    path = folder / "shd_train.h5"
    whole = path.read_bytes()
    config = settings(name="shd", dir=str(folder), num_frames=3, num_validation=0)

    def refused(says):
        readers.forget()
        with pytest.raises(UserError, match=says) as caught:
            data.load(**config)
        assert "\n" not in str(caught.value) and "shd_train.h5" in str(caught.value)

    for content in (b"", b"nonsense", whole[:500], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused("cannot be read as HDF5")
    write_spike_trains(path, rng, [20, 0])
    refused("label outside of 0 to 19")
    for changes, says in (
        ({"spikes/units": [np.array([0, 700]), np.array([0, 1])]}, "channels outside of 0 to 699"),
        ({"spikes/times": [np.array([0.5, 0.1]), np.array([0.1, 0.2])]}, "time goes back"),
        ({"spikes/times": [np.array([0.1, np.nan]), np.array([0.1, 0.2])]}, "no seconds"),
        ({"spikes/times": [np.array([0.1]), np.array([0.1, 0.2])]}, "not as many"),
        ({"spikes/times": [np.array([]), np.array([0.1, 0.2])], "spikes/units": [np.array([])] * 2}, "no event"),
    ):  # fmt: skip
        path.unlink()
        write_spike_trains(path, rng, [0, 1], size=2)
        with h5py.File(path, "a") as file:
            for name, rows in changes.items():
                for row, values in enumerate(rows):
                    file[name][row] = values
        refused(says)
        assert Path(path).exists()


def test_cameras_settings_are_refused(folder, rng):
    write_shd(folder, rng)
    for change in ({"crop": 1}, {"denoise_us": 5.0}):
        with pytest.raises(UserError, match="spike trains"):
            data.load(**settings(name="shd", dir=str(folder), **change))


def test_tonic_knows_the_same_files():
    for name in ("shd", "ssc"):
        known = getattr(tonic.datasets, name.upper())
        for split in ("train", "test"):
            assert getattr(known, f"{split}_zip") == f"{name}_{split}.h5.zip"
        assert sets.EVENT_SETS[name].size[2] == known.sensor_size[0]
