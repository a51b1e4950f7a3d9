"""The client of Kaggle against a mock server."""

import sys

import pytest

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub import catalogue
from paligemma_jax.hub.catalogue import Kaggle
from paligemma_jax.hub.download import cached
from paligemma_jax.loading import find_checkpoint
from tests.hub.server import Cut, FakeHub, Flipped, Status

HANDLE = "google/paligemma-2/jax/paligemma2-3b-pt-224"
NPZ = "paligemma2-3b-pt-224.b16.npz"
CONTENT = bytes(range(256)) * 8000
CONFIG = {"config.json": b"{}", "model.safetensors": b"weights"}

pytest.importorskip("kagglehub", reason='pip install "paligemma-jax[hub]"')


@pytest.fixture(autouse=True)
def model(hub: FakeHub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_kaggle_model(HANDLE, 2, {NPZ: CONTENT, "paligemma2-3b-pt-224.npz": b"float32"})
    hub.files["/big_vision/paligemma_tokenizer.model"] = b"tokenizer"
    monkeypatch.setattr(catalogue, "STORAGE", hub.url)
    from kagglesdk import kaggle_env

    # It looks through the stack of calls, which under a test runner is long.
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, hub.url)


def test_one_file_once_then_without_kaggle(hub: FakeHub, monkeypatch, capfd):
    path = find_checkpoint(HANDLE, progress=lambda *values: None)
    assert path.name == NPZ and path.read_bytes() == CONTENT and path.parent.name == "2"
    assert (path.parent / "paligemma_tokenizer.model").read_bytes() == b"tokenizer"
    assert len(list(path.parent.iterdir())) == 2
    assert capfd.readouterr() == ("", "")
    hub.close()
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not even the client is needed
    for name in (HANDLE, f"{HANDLE}/2", f"kaggle://{HANDLE}",
                 f"https://www.kaggle.com/models/{HANDLE}"):  # fmt: skip
        assert find_checkpoint(name) == path
    with pytest.raises(MissingExtraError, match="hub"):
        find_checkpoint(f"{HANDLE}/3")


def test_precision(hub: FakeHub):
    assert find_checkpoint(f"{HANDLE}@float32").read_bytes() == b"float32"
    assert find_checkpoint(f"{HANDLE}@bfloat16").read_bytes() == CONTENT
    assert find_checkpoint(f"{HANDLE}@float32").read_bytes() == b"float32"


@pytest.mark.parametrize(
    "fault", [Status(429, {"Retry-After": "2"}), Status(500), Cut(9), Flipped()]
)
def test_faults_that_pass(hub: FakeHub, fault):
    hub.faults[f"/storage/{NPZ}"] = [fault]
    assert find_checkpoint(HANDLE).read_bytes() == CONTENT


def test_faults_that_stay(hub: FakeHub):
    hub.faults[f"/storage/{NPZ}"] = [Flipped(), Flipped()]
    with pytest.raises(CheckpointError, match="damaged on its way, twice"):
        find_checkpoint(HANDLE)
    hub.faults[f"/storage/{NPZ}"] = [Status(503)] * 10
    with pytest.raises(CheckpointError, match="cannot be downloaded from www.kaggle.com"):
        find_checkpoint(HANDLE)


def test_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    hub.token = "right"
    with pytest.raises(CheckpointError) as e:
        find_checkpoint(HANDLE)
    for words in (f"Open https://www.kaggle.com/models/{HANDLE}, accept", "KAGGLE_API_TOKEN"):
        assert words in str(e.value)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    with pytest.raises(CheckpointError, match="may not read it"):
        find_checkpoint(HANDLE)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "right")
    assert find_checkpoint(HANDLE).read_bytes() == CONTENT


def test_directory_of_another_framework(hub: FakeHub):
    handle = "someone/tuned/transformers/small"
    hub.add_kaggle_model(handle, 1, CONFIG)
    path = find_checkpoint(f"kaggle://{handle}")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == CONFIG
    assert cached(Kaggle(handle)) == path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("google/paligemma-2/jax/paligemma2-3b-pt-999", "nor a model at Kaggle"),
        (HANDLE.replace("jax/", "gemmaCpp/"), f"Try: {HANDLE}"),
    ],
)
def test_not_there_or_not_read(name: str, words: str):
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(name)
