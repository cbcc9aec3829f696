"""Downloads event sets through tonic, which checks the archives against recorded checksums."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from mpisjax.data.download import MIRROR, STALL_SECONDS, probe
from mpisjax.data.events import import_tonic
from mpisjax.errors import UserError

CLASSES = {"nmnist": "NMNIST", "dvs_gesture": "DVSGesture", "cifar10_dvs": "CIFAR10DVS"}


def download(name: str, folder: Path) -> Path:
    """Downloads and unpacks an event set.

    It is unpacked under another name and renamed when whole, so that a download cut short is never taken for a subset.

    Args:
        name: The set's name in the configuration.
        folder: Where to keep it.

    Returns:
        The folder that has the set in it.

    Raises:
        UserError: If the server cannot be reached within seconds, the download fails or stalls, a checksum is wrong, or
            the folder cannot be written.
    """
    kind = CLASSES[name]
    original = getattr(import_tonic().datasets, kind)
    names = [attribute for attribute in ("url", "train_url", "test_url") if hasattr(original, attribute)]
    addresses = {attribute: getattr(original, attribute) for attribute in names}
    mirror = os.environ.get(MIRROR)
    if mirror:  # whose files have the names that tonic gives them: `train_url` goes with `train_filename`
        for attribute in names:
            filename = getattr(original, attribute.replace("url", "filename"))
            addresses[attribute] = f"{mirror.rstrip('/')}/{filename}"
    probe(addresses[names[0]])
    dataset = type(kind, (original,), addresses)  # of the same name, from which tonic makes its folder's
    partial = folder / f".partial-{kind}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if name == "cifar10_dvs":  # one archive for both splits
            dataset(save_to=str(partial))
        else:
            for train in (True, False):
                dataset(save_to=str(partial), train=train)
        if (folder / kind).exists():
            shutil.rmtree(folder / kind)
        (partial / kind).rename(folder / kind)
    except Exception as error:  # tonic, zipfile, tarfile, urllib and the file system each have their own
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"the download of {name} to {partial} failed: {type(error).__name__}: {text}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    shutil.rmtree(partial, ignore_errors=True)
    return folder
