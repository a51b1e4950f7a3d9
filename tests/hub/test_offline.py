"""What needs neither a hub nor its client."""

import sys
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub.catalogue import Kaggle
from paligemma_jax.hub.download import cached
from paligemma_jax.loading import find_checkpoint
from tests.hub.server import FakeHub

NAME = "google/paligemma-3b-pt-224"
HANDLE = "google/paligemma-2/jax/paligemma2-3b-pt-224"
NPZ = "paligemma2-3b-pt-224.b16.npz"


def test_offline_and_not_in_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match=f"paligemma download {NAME}"):
        find_checkpoint(NAME, local_only=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        find_checkpoint(NAME)
    assert not hub.requests


def test_what_was_not_finished_does_not_count(caches: Path):
    folder = caches / "kagglehub" / "models" / HANDLE / "1"
    folder.mkdir(parents=True)
    (folder / NPZ).write_bytes(b"half")
    assert cached(Kaggle(HANDLE)) is None
    marker = folder.parent / ".complete" / "1" / f"{NPZ}.complete"
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert cached(Kaggle(HANDLE)) == folder / NPZ
    assert cached(Kaggle(HANDLE, 1)) == folder / NPZ
    assert cached(Kaggle(HANDLE, 2)) is None
    assert cached(Kaggle(HANDLE, None, "float32")) is None


@pytest.mark.parametrize(("name", "client"), [(NAME, "huggingface_hub"), (HANDLE, "kagglehub")])
def test_without_the_extra(name: str, client: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(MissingExtraError, match=r'pip install "paligemma-jax\[hub\]"'):
        find_checkpoint(name)
