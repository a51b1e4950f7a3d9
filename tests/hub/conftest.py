"""A fake hub, an empty cache, and no waiting."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from paligemma_jax.hub import http
from tests.hub.server import FakeHub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(http, "sleep", seconds.append)
    return seconds


_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE", "KAGGLE_API_TOKEN", "KAGGLE_KEY", "KAGGLE_USERNAME",
)  # fmt: skip


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: FakeHub) -> Path:
    """Every cache under one empty directory, nobody logged in, the fake hub instead of the real."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HOME", str(cache / "huggingface"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(cache / "kagglehub"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(cache / "kaggle"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    if importlib.util.find_spec("huggingface_hub") is not None:
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
    return cache
