"""No test of this folder reads or writes the user's own data or cache, or reaches the network."""

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("MPISJAX_MIRROR", "http://127.0.0.1:9")  # the discard port: refused at once
