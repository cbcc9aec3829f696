"""A run whose folder lies in a bucket, against an emulator of Google Cloud Storage on 127.0.0.1; no real bucket is
used.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from http import HTTPStatus
from http.server import HTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mpisjax.errors import UserError
from mpisjax.storage import checkpoints, run_folder
from mpisjax.storage.run_folder import hold
from mpisjax.storage.saving import CheckpointWriter

sys.path.insert(0, str(Path(__file__).parent))
from test_devices import environment, free_port
from test_processes import ROOT, SMALL


class Bucket(NamedTuple):
    """An emulated bucket: where it is, and what a program needs in its environment to find it there."""

    address: str
    environment: dict[str, str]

    def names(self, prefix: str) -> set[str]:
        """Of all objects below a folder."""
        with urllib.request.urlopen(f"{self.address}/storage/v1/b/bucket/o?prefix={prefix}/") as answer:
            items = json.load(answer).get("items", [])
        return {item["name"].removeprefix(f"{prefix}/") for item in items}

    def read(self, name: str) -> bytes:
        """One object."""
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{self.address}/download/storage/v1/b/bucket/o/{quoted}?alt=media") as answer:
            return answer.read()

    def run(self, *command: object) -> str:
        """Runs a program; gives what it says."""
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def with_generations(monkeypatch, objects) -> None:
    """Gives the emulator what it leaves out and tensorstore relies on: an object's generation when it is read, and
    writes that take place only while the generation is the one expected. Without them every second write to a
    checkpoint's manifest may fail ("Malformed StorageGeneration").
    """
    download, upload = objects.download, objects._media_upload

    def generation(request, storage, name):
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except objects.NotFound:
            return "0"

    def download_with(request, response, storage, *args, **kwargs):
        response["x-goog-generation"] = generation(request, storage, request.params["object_id"])
        download(request, response, storage, *args, **kwargs)

    def upload_if(request, response, storage):
        expected = request.query.get("ifGenerationMatch", [None])[0]
        if expected in (None, generation(request, storage, request.query["name"][0])):
            upload(request, response, storage)
        else:
            assert request.data is not None  # read, so that the connection ends in order
            response.status = HTTPStatus.PRECONDITION_FAILED

    monkeypatch.setattr(objects, "download", download_with)
    monkeypatch.setattr(objects, "_media_upload", upload_if)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    server_of = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    port = free_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_generations(monkeypatch, importlib.import_module("gcp_storage_emulator.handlers.objects"))
        monkeypatch.setattr(HTTPServer, "request_queue_size", 128)  # else connections are refused
        server = server_of.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield _bucket(port, tmp_path_factory.mktemp("cache"))
        server.stop()


def _bucket(port: int, folder: Path) -> Bucket:
    address = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        "XDG_CACHE_HOME": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return Bucket(address, {**environment(2), **variables})


def check_checkpoints(address: str) -> None:
    """All that is done with checkpoints on a disk; as a program of its own, since its libraries look for
    credentials.
    """
    import jax.numpy as jnp

    state = {"a": jnp.arange(6.0), "b": jnp.ones((2, 3))}
    folder = run_folder.path_of(address)
    assert checkpoints.steps(folder) == [] and checkpoints.newest(folder) is None
    with CheckpointWriter(folder, keep=3) as writer:
        for step in (1, 2, 3):
            saved = writer.save(step, {**state, "a": state["a"] + step}, {"note": "first"})
    checkpoints.update(saved, {"note": "second"})
    assert checkpoints.steps(folder) == [1, 2, 3]
    found = checkpoints.newest(folder)
    assert found is not None and found.step == 3 and found.content == {"note": "second"}
    np.testing.assert_array_equal(checkpoints.restore(found, state)["a"], np.arange(6.0) + 3)
    # One without its record does not count; a damaged one is passed over, and is gone when the run goes on.
    (folder / "step_00000003" / checkpoints.RECORD_NAME).unlink()
    assert checkpoints.steps(folder) == [1, 2]
    victim = folder / "step_00000002" / "state" / "_METADATA"
    victim.write_bytes(victim.read_bytes() + b" ")
    # One that has its record and not orbax's mark, as of a run killed between the two or of an earlier version, counts.
    (folder / "step_00000001" / checkpoints.COMMIT_NAME).unlink()
    with CheckpointWriter(folder, keep=1) as writer:
        found = writer.newest()
        assert found is not None and found.step == 1 and checkpoints.steps(folder) == [1]
        np.testing.assert_array_equal(checkpoints.restore(found, state)["a"], np.arange(6.0) + 1)
        # The same step over again, and what is outrun goes.
        writer.save(3, state, {})
    assert checkpoints.steps(folder) == [3]
    print("checked")


@pytest.mark.slow
def test_checkpoints(bucket):
    assert "checked" in bucket.run(__file__, "gs://bucket/checkpoints")
    assert {name.split("/")[0] for name in bucket.names("checkpoints")} == {"step_00000003"}


@pytest.mark.slow
def test_a_run_and_its_evaluation(bucket, tmp_path):
    train = (ROOT / "train.py", "--workdir=gs://bucket/runs/digits", *SMALL, "--config.train.epochs=1")
    bucket.run(*train)
    names = {name.split("/")[0] for name in bucket.names("runs/digits")}
    assert {"checkpoints", "curves.png", "metrics.jsonl", "results.json", "tensorboard", "train.log"} <= names
    # On another machine nothing of it is here: it goes on, and evaluation reads it.
    other = bucket._replace(environment={**bucket.environment, "XDG_CACHE_HOME": str(tmp_path / "other")})
    assert "going on from the checkpoint of step 19 of 19" in other.run(*train)
    rows = [json.loads(line) for line in bucket.read("runs/digits/metrics.jsonl").splitlines()]
    assert [row["kind"] for row in rows] == ["train", "validation", "test"]
    other.run(ROOT / "evaluate.py", "--workdir=gs://bucket/runs/digits", "--json", tmp_path / "out.json")
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["accuracy"] == json.loads(bucket.read("runs/digits/results.json"))["accuracy"]


def test_addresses_that_cannot_be(monkeypatch):
    for address in ("gs://", "http://host/folder", "s3://bucket/folder"):
        with pytest.raises(UserError, match=r"gs://BUCKET/FOLDER"):
            run_folder.path_of(address)
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gcsfs"), hold("gs://bucket/folder"):
        pass


def test_a_folder_on_a_disk_is_its_own(tmp_path):
    assert run_folder.path_of(str(tmp_path)) == run_folder.local_of(tmp_path) == tmp_path
    (tmp_path / "kept").write_text("kept")
    run_folder.pull(tmp_path)
    run_folder.push(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


if __name__ == "__main__":
    check_checkpoints(sys.argv[1])
