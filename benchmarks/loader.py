"""How many images a second the data loader delivers, next to nothing else.

    python -m benchmarks.loader [--name fashion_mnist] [--dir DIR] [--batch_size 128] [--batches 200]

For an event set an "image" is a whole recording of `--num_frames` frames. Prints, for batches gathered on the host (as on a
CPU) and on the device (as on an accelerator), the images a second of `Feed.batch`, each batch waited for, and, for static
sets, of `augment` with flip, shift and cutout after it. To be compared with what a training step takes: see the rate that
`train.py` prints.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from mpisjax import data


def rate(batch: Callable[[int], Any], batches: int, batch_size: int) -> float:
    """Images a second, after one batch to warm up."""
    jax.block_until_ready(batch(0))
    began = time.perf_counter()
    for step in range(batches):
        jax.block_until_ready(batch(step))
    return batches * batch_size / (time.perf_counter() - began)


def measure(
    name: str = "digits",
    folder: str = "",
    *,
    batch_size: int = 128,
    batches: int = 200,
    num_frames: int = 10,
    frames: str = "binary",
) -> list[dict[str, Any]]:
    """Images a second, for batches gathered on the host and on the device, without and with augmentation.

    Args:
        name: The data set.
        folder: Its folder (`data.dir`).
        batch_size: Images a batch.
        batches: Batches timed.
        num_frames: Of event sets.
        frames: Of event sets: "binary" or "count".
    """
    config = ConfigDict(
        {
            "name": name,
            "dir": folder,
            "cache_dir": "",
            "source": "auto",
            "num_validation": 0,
            "split_seed": 0,
            "crop": 0,
            "num_frames": num_frames,
            "frames": frames,
            "binning": "time",
            "denoise_us": 0.0,
            "augment": {"flip": True, "shift": 2, "cutout": 4, "mixup": 0.0},
        }
    )
    began = time.perf_counter()
    dataset = data.load(config)
    print(f"{dataset.source}; loaded in {time.perf_counter() - began:.2f} s; {jax.devices()[0].platform}")
    augment = jax.jit(lambda key, images: data.augment(key, images, config.augment))
    rows = []
    for on_device in (False, True):
        feed = data.Feed(dataset.train, batch_size, seed=0, on_device=on_device)

        def augmented(step: int, feed: data.Feed = feed) -> jax.Array:
            return augment(jax.random.key(step), feed.batch(step).images)

        rows.append(
            {
                "data set": name,
                "gathered on": "device" if on_device else "host",
                "batch": batch_size,
                "images/s": rate(feed.batch, batches, batch_size),
                "images/s, augmented": rate(augmented, batches, batch_size),
            }
        )
    return rows


def main() -> None:
    """Loads, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="digits", help="the data set")
    parser.add_argument("--dir", default="", help="its folder (data.dir)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--num_frames", type=int, default=10, help="of event sets")
    parser.add_argument("--frames", default="binary", choices=["binary", "count"], help="of event sets")
    flags = parser.parse_args()
    for row in measure(
        flags.name,
        flags.dir,
        batch_size=flags.batch_size,
        batches=flags.batches,
        num_frames=flags.num_frames,
        frames=flags.frames,
    ):
        print(f"gathered on the {row['gathered on']}: {row['images/s']:,.0f} images/s")
        print(f"  and augmented: {row['images/s, augmented']:,.0f} images/s")


if __name__ == "__main__":
    main()
