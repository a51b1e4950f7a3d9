"""Models at any address, and the open copy in Google's storage."""

import hashlib
import json
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub import catalogue
from paligemma_jax.loading import find_checkpoint
from paligemma_jax.weights.checkpoint import open_checkpoint
from tests.hub.server import Cut, FakeHub, Flipped, Status

GOLDEN = Path(__file__).parents[1] / "golden"
NPZ = (GOLDEN / "big_vision" / "pg1.params.npz").read_bytes()
HF = {path.name: path.read_bytes() for path in (GOLDEN / "huggingface/pg1/hub_old").iterdir()}


@pytest.fixture(autouse=True)
def files(hub: FakeHub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["/bucket/pt_224.npz"] = NPZ
    for name, content in HF.items():
        hub.files[f"/model/{name}"] = content
    hub.files["/model/tokenizer.json"] = b"{}"
    monkeypatch.setattr(catalogue, "STORAGE", hub.url)


def test_npz_with_what_lies_beside_it(hub: FakeHub):
    hub.files["/bucket/tokenizer.model"] = b"tokenizer"
    hub.files["/bucket/vae-oid.npz"] = b"codec"
    seen: list[tuple[str, int, int]] = []
    path = find_checkpoint("gs://bucket/pt_224.npz", progress=lambda *v: seen.append(v))
    assert path.name == "pt_224.npz" and path.read_bytes() == NPZ
    assert (path.parent / "tokenizer.model").read_bytes() == b"tokenizer"
    assert (path.parent / "vae-oid.npz").read_bytes() == b"codec"
    assert seen[-1][1] == seen[-1][2] == len(NPZ) + len("tokenizercodec")
    count = len(hub.requests)
    hub.close()
    assert find_checkpoint("gs://bucket/pt_224.npz") == path
    assert find_checkpoint("gs://bucket/pt_224.npz", local_only=True) == path
    assert len(hub.requests) == count
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "big_vision"


def test_open_copy_is_called_by_its_name(hub: FakeHub):
    address = catalogue.OPEN_COPIES["paligemma-3b-pt-224"]
    hub.files[f"/{address.removeprefix('gs://')}"] = NPZ
    hub.files["/big_vision/paligemma_tokenizer.model"] = b"tokenizer"
    path = find_checkpoint(address)
    assert "paligemma-3b-pt-224" in str(path)  # so that its text length is known
    assert (path.parent / "paligemma_tokenizer.model").read_bytes() == b"tokenizer"


def test_file_names_that_lead_outside(hub: FakeHub, caches: Path):
    hub.files["/../../../evil.npz"] = NPZ
    path = find_checkpoint(f"{hub.url}/..%2f..%2f..%2fevil.npz")
    assert path.read_bytes() == NPZ
    assert path.resolve().parents[1] == (caches / "paligemma-jax" / "downloads").resolve()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_tokenizer_that_is_closed_is_left_out(hub: FakeHub, status: int):
    hub.faults["/big_vision/paligemma_tokenizer.model"] = [Status(status)]
    path = find_checkpoint("gs://bucket/pt_224.npz")
    assert [file.name for file in path.parent.iterdir() if file.name[0] != "."] == ["pt_224.npz"]


def test_directory(hub: FakeHub):
    path = find_checkpoint(f"{hub.url}/model/")
    names = {file.name for file in path.iterdir() if file.name[0] != "."}
    assert names == {*HF, "tokenizer.json"}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "huggingface"


def test_directory_in_shards(hub: FakeHub):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    hub.files["/model/model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files["/model/one.safetensors"] = b"1"
    hub.faults["/model/two.safetensors"] = [Status(500)] * 10
    hub.files["/model/two.safetensors"] = b"2"
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        find_checkpoint(f"{hub.url}/model")
    with pytest.raises(CheckpointError, match="in the cache"):
        find_checkpoint(f"{hub.url}/model", local_only=True)
    hub.faults.clear()
    path = find_checkpoint(f"{hub.url}/model")
    assert (path / "one.safetensors").read_bytes() == b"1" and (path / "two.safetensors").exists()
    assert len(hub.asked("/model/one.safetensors")) == 1
    assert not (path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "weights.bin", ""])
def test_index_that_names_other_files(hub: FakeHub, name: str):
    index = {"weight_map": {"a": name}}
    hub.files["/model/model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match="not an index of shards"):
        find_checkpoint(f"{hub.url}/model")


def test_faults_that_pass_and_digest_of_the_user(hub: FakeHub):
    digest = hashlib.sha256(NPZ).hexdigest()
    path = "/bucket/pt_224.npz"
    hub.faults[path] = [Status(429, {"Retry-After": "1"}), Cut(1000), Flipped(), Status(502)]
    found = find_checkpoint(f"{hub.url}{path}#sha256={digest}")
    assert found.read_bytes() == NPZ and not hub.faults[path]
    with pytest.raises(CheckpointError, match="was damaged on its way, twice"):
        find_checkpoint(f"{hub.url}{path}#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing.npz", "the server says nothing.npz: 404"),
        ("/model/model.safetensors", "Try: .*/model/"),
        ("/model/pytorch_model.bin", "not the address of a whole model"),
        ("/empty/", "cannot be downloaded.*config.json: 404"),
    ],
)
def test_no_model(hub: FakeHub, path: str, words: str):
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(f"{hub.url}{path}")
