"""Small files in the formats of the data sets, and arguments of `mpisjax.data.load`."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from mpisjax.data import images
from mpisjax.data.events import readers


def settings(**changes) -> dict:
    """Arguments of `mpisjax.data.load`: the digits, unless changed."""
    return {"name": "digits", "num_validation": 100, "num_frames": 10} | changes


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, rng: np.random.Generator, num_train: int, num_test: int) -> dict:
    """The four gzipped files of MNIST with random content; returns the arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, stem, size in (("train", "train", num_train), ("test", "t10k", num_test)):
        images = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images), 1, mtime=0))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels), 1, mtime=0))
        arrays[split] = (images, labels)
    return arrays


def cifar_records(rng: np.random.Generator, size: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random planes uint8 [size, 3072] and labels."""
    return rng.integers(0, 256, (size, 3072), np.uint8), (np.arange(size) % num_classes).astype(np.uint8)


def tar_bytes(members: list[tuple[str, bytes]], mode: str = "w:gz") -> bytes:
    """A tar archive of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_members(name: str, rng: np.random.Generator, size: int, version: str = "binary") -> tuple[list, dict]:
    """Members of an archive of CIFAR with `size` images a file, and the arrays it holds (planes, labels)."""
    layout = images.CIFAR_LAYOUTS[name][0 if version == "binary" else 1]
    members, arrays = [], {"train": [], "test": []}
    for file in (*layout.train, layout.test):
        pixels, labels = cifar_records(rng, size, layout.num_classes)
        arrays["test" if file == layout.test else "train"].append((pixels, labels))
        if version == "binary":
            coarse = labels[:, None] // 5
            columns = [labels[:, None], pixels] if name == "cifar10" else [coarse, labels[:, None], pixels]
            content = np.concatenate(columns, 1).tobytes()
        else:
            batch = {b"batch_label": b"batch", layout.label_key.encode(): labels.tolist(), b"data": pixels}
            content = pickle.dumps(batch, protocol=2)
        members.append((f"{layout.folder}/{file}", content))
    joined = {
        split: tuple(np.concatenate(part) for part in zip(*parts, strict=True)) for split, parts in arrays.items()
    }
    return members, joined


def images_of(planes: np.ndarray) -> np.ndarray:
    """Planes uint8 [N, 3072] as images [N, 32, 32, 3], by the obvious loop."""
    images = np.empty((len(planes), 32, 32, 3), np.uint8)
    for channel in range(3):
        images[..., channel] = planes[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
    return images


def random_events(rng: np.random.Generator, size: int, width: int, height: int, duration: int = 300_000) -> np.ndarray:
    """Valid events in time order."""
    recorded = np.empty(size, readers.EVENT)
    for name, end in (("x", width), ("y", height), ("p", 2)):
        recorded[name] = rng.integers(0, end, size)
    recorded["t"] = np.sort(rng.integers(0, duration, size))
    return recorded


def nmnist_bytes(recorded: np.ndarray) -> bytes:
    """Events as N-MNIST's `.bin`."""
    rows = np.empty((len(recorded), 5), np.uint8)
    t = recorded["t"]
    rows[:, 0], rows[:, 1] = recorded["x"], recorded["y"]
    rows[:, 2], rows[:, 3], rows[:, 4] = recorded["p"] << 7 | t >> 16, t >> 8 & 255, t & 255
    return rows.tobytes()


def aedat2_bytes(recorded: np.ndarray) -> bytes:
    """Events as CIFAR10-DVS's `.aedat`."""
    address = (127 - recorded["x"]) << 8 | (127 - recorded["y"]) << 1 | (1 - recorded["p"])
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n#End Of ASCII Header\r\n"
    return header + np.stack([address, recorded["t"]], 1).astype(">u4").tobytes()


def aedat3_bytes(recorded: np.ndarray, packet: int = 64) -> bytes:
    """Events as DVS128 Gesture's `.aedat`, with a packet of another type and an invalid event among them."""
    content = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
    for start in range(0, len(recorded), packet):
        part = recorded[start : start + packet]
        word = part["x"].astype(np.int64) << 17 | part["y"] << 2 | part["p"] << 1 | 1
        pairs = np.stack([word, part["t"]], 1)
        pairs = np.concatenate([pairs, [[999 << 17, 0]]])  # marked invalid
        numbers = (8, 4, 0, len(pairs) + 1, len(pairs), len(part))
        content += np.array([1, 1], "<u2").tobytes() + np.array(numbers, "<u4").tobytes()
        content += pairs.astype("<u4").tobytes() + bytes(8)  # room for one more event than there is
        content += np.array([0, 1], "<u2").tobytes() + np.array([8, 4, 0, 1, 1, 1], "<u4").tobytes() + bytes(8)
    return content


def write_nmnist(folder: Path, rng: np.random.Generator, num_train: int, num_test: int, size: int = 400) -> dict:
    """A small N-MNIST; returns the events by split, in the order of the numbers."""
    made: dict[str, list] = {"Train": [], "Test": []}
    for split, count in (("Train", num_train), ("Test", num_test)):
        for number in range(count):
            path = folder / "NMNIST" / split / str(number % 10) / f"{number + 1:05d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            made[split].append(random_events(rng, size, 34, 34))
            path.write_bytes(nmnist_bytes(made[split][-1]))
    return made


def write_spike_trains(path: Path, rng: np.random.Generator, labels: list[int], size: int = 200) -> list:
    """An HDF5 file in the format of SHD and SSC; returns (times in seconds, units) of each recording."""
    import h5py

    trains = []
    for _ in labels:
        times = np.sort(rng.uniform(0, 0.8, size)).astype(np.float16)
        trains.append((times, rng.integers(0, 700, size).astype(np.uint16)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, column, dtype in (("times", 0, np.float16), ("units", 1, np.uint16)):
            stored = file.create_dataset(f"spikes/{name}", (len(labels),), h5py.vlen_dtype(dtype))
            for row, train in enumerate(trains):
                stored[row] = train[column]
        file["labels"] = np.array(labels, np.uint16)
        file["extra/speaker"] = np.zeros(len(labels), np.uint16)
        file["extra/keys"] = np.array([b"zero", b"one"])
    return trains
