"""info, models and download, against a mock hub."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from paligemma_jax.cli.models import decoder_name, encoder_name
from paligemma_jax.cli.output import data_size
from paligemma_jax.config import VARIANTS
from tests.cli.conftest import Run
from tests.hub.server import FakeHub

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface" / "pg1" / "hub_old"
FILES = {path.name: path.read_bytes() for path in GOLDEN.iterdir()} | {"tokenizer.model": b"words"}
NAME = "paligemma-3b-pt-224"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.add_repository(f"google/{NAME}", FILES)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    if importlib.util.find_spec("huggingface_hub") is not None:
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    yield hub
    hub.close()


@pytest.mark.usefixtures("hub")
def test_all_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = run("models").out.splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == list(VARIANTS)
    assert max(map(len, lines)) <= 120
    rows = [json.loads(line) for line in run("models", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == list(VARIANTS)
    row = next(row for row in rows if row["name"] == "paligemma-3b-ft-docvqa-896")
    assert row["image_tokens"] == 4096 and row["text_length"] == 32
    assert row["score"] == {"metric": "ANLS", "values": [84.77]} and row["resolution"] == 896
    assert row["memory_bytes"]["bfloat16"] == 2 * row["parameters"] and row["cached"] == []
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
    assert run("download", "demo").out.endswith("demo\n")
    outcome = run("download", NAME, "--revision", "v9")
    assert outcome.code == 1 and "main, bfloat16, float16" in outcome.err


def test_info_of_a_directory(run: Run, store: Path):
    outcome = run("info", store)
    for words in ("written by paligemma-jax", "in float32", "present", "8 x 8 pixels", "bilinear"):
        assert words in outcome.out
    document = json.loads(run("info", store, "--json").out)
    assert document["checkpoint"]["kind"] == "orbax" and document["checkpoint"]["tokenizer"]
    assert document["parameters"]["total"] * 4 == document["checkpoint"]["stored_bytes"]
    assert document["weight_bytes"]["int4"] * 8 == document["checkpoint"]["stored_bytes"]


def test_check_finds_a_flipped_bit(run: Run, store: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    largest = max((copy / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outcome = run("info", copy, "--check")
    assert outcome.code == 1 and "damaged" in outcome.err and outcome.out == ""


def test_info_of_a_published_name(run: Run):
    outcome = run("info", "google/paligemma2-3b-mix-448")
    for words in ("SigLIP So400m/14", "Gemma 2 2B", "3,032,979,696", "512 tokens", "1,024 image",
                  "6.07 GB", "106.5 MB", "paligemma download paligemma2-3b-mix-448"):  # fmt: skip
        assert words in outcome.out
    document = json.loads(run("info", "paligemma-3b-pt-224", "--json").out)
    assert document["parameters"]["total"] == 2_923_335_408
    assert document["kv_cache_bytes_per_token"]["bfloat16"] == 2 * 18 * 256 * 2
    assert "checkpoint" not in document


def test_every_published_model_has_a_published_encoder_and_decoder():
    for config in VARIANTS.values():
        assert encoder_name(config.img) == "SigLIP So400m/14"
        assert "other size" not in decoder_name(config.llm)


def test_unknown_names_suggest_near_ones(run: Run, image: Path):
    for argv, near in (
        (["info", "paligemma2-3b-mix-484"], "paligemma2-3b-mix-448"),
        (["download", "paligemma2-3b-mix-484"], "paligemma2-3b-mix-448"),
        (["caption", image, "--model", "demmo"], "demo"),
    ):
        outcome = run(*argv)
        assert outcome.code == 1 and f"Did you mean {near}" in outcome.err


def test_published_name_without_files_says_how_to_get_them(
    run: Run, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in (
        ["caption", image, "--model", "paligemma-3b-mix-224"],
        ["info", "paligemma-3b-mix-224", "--check"],
    ):
        outcome = run(*command)
        assert outcome.code == 1 and "paligemma download" in outcome.err


def test_sizes_in_words():
    sizes = {0: "0 B", 999: "999 B", 7_774_848: "7.775 MB", 6.066e9: "6.07 GB"}
    assert {count: data_size(count) for count in sizes} == sizes
