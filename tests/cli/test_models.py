"""`paligemma models` and `paligemma download`, at a server that plays the hub."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.hub import download as huggingface
from tests.cli.conftest import Run
from tests.hub.server import FakeHub

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface" / "pg1" / "hub_old"
FILES = {path.name: path.read_bytes() for path in GOLDEN.iterdir()} | {"tokenizer.model": b"words"}
NAME = "paligemma-3b-pt-224"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.add_repository(f"google/{NAME}", FILES)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface, "login_token", lambda: None)
    yield hub
    hub.close()


def test_all_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = run("models").out.splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == list(VARIANTS)
    assert max(map(len, lines)) <= 120
    rows = [json.loads(line) for line in run("models", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == list(VARIANTS)
    row = next(row for row in rows if row["name"] == "paligemma-3b-ft-docvqa-896")
    assert row["score"] == {"metric": "ANLS", "values": [84.77]} and row["resolution"] == 896
    assert row["memory_bytes"]["bfloat16"] == 2 * row["parameters"] and row["cached"] == []


def test_some_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = run("models", "docvqa", "448").out.splitlines()
    assert len(lines) == 2 and "3B" in lines[1] and "5.85 GB" in lines[1]
    assert "questions about documents; ANLS 78.02" in lines[1]
    assert "paligemma2-28b-mix-224" in run("models", "pali_gemma2_28b_mix_224").out
    assert run("models", "--cached").out == "none\n"


@pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None,
    reason='huggingface_hub is not installed: pip install "paligemma-jax[hub]"',
)
def test_download_then_it_is_in_the_cache(run: Run, hub: FakeHub):
    outcome = run("download", NAME, "--progress")
    assert outcome.code == 0 and f"downloading google/{NAME}" in outcome.err
    path = Path(outcome.out.rstrip("\n"))
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    row = json.loads(run("models", "--cached", "--json").out)
    assert row["name"] == NAME
    assert row["cached"] == [{"source": f"google/{NAME}", "path": str(path)}]
    count = len(hub.requests)
    assert run("download", NAME).out == outcome.out and len(hub.requests) == count + 1
    outcome = run("download", NAME, "--revision", "v9")
    assert outcome.code == 1 and "main, bfloat16, float16 fit" in outcome.err


def test_download_of_what_is_here_or_nowhere(run: Run, tmp_path: Path):
    assert run("download", "demo").out.endswith("demo\n")
    outcome = run("download", "paligemma2-3b-mix-484")
    assert outcome.code == 1 and "Did you mean paligemma2-3b-mix-448" in outcome.err
