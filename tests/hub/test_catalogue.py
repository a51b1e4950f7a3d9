"""The catalogue: every model, every name, and the location of each."""

from collections import Counter
from pathlib import Path

import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.catalogue import (
    MODELS,
    HuggingFace,
    Kaggle,
    Web,
    find_location,
    find_model,
)
from paligemma_jax.hub.files import choose_npz, needed_files, npz_names
from paligemma_jax.loading import find_checkpoint, published_name

BASE = "google/paligemma-3b-pt-224"


def test_every_published_model_is_there():
    counts = Counter((entry.generation, entry.kind) for entry in MODELS.values())
    assert counts == {(1, "pt"): 3, (1, "mix"): 2, (1, "ft"): 54, (2, "pt"): 9, (2, "mix"): 6,
                      (2, "ft"): 2}  # fmt: skip
    for name, entry in MODELS.items():
        assert entry.name == name and entry.config is VARIANTS[name]
        assert entry.resolution == entry.config.img.image_size
        assert entry.use and (entry.score is not None) == (entry.kind == "ft")
        assert len(entry.revisions) == (3 if entry.generation == 1 else 1)


def test_published_scores():
    assert str(MODELS["paligemma-3b-ft-docvqa-896"].score) == "ANLS 84.77"
    assert str(MODELS["paligemma-3b-ft-tallyqa-224"].score) == (
        "accuracy simple / complex 81.72 / 69.56"
    )
    assert "28.4" in str(MODELS["paligemma2-3b-ft-docci-448"].score)


def test_no_two_models_share_a_name():
    names = [name for entry in MODELS.values() for name in (entry.name, *entry.aliases)]
    assert max(Counter(names).values()) == 1
    for entry in MODELS.values():
        for name in (entry.name, *entry.aliases):
            assert find_model(name) is entry and find_model(f"google/{name}") is entry
            assert published_name(name.upper()) == entry.name


PG1, PG2 = "google/paligemma/jax/paligemma-3b-pt-224", "google/paligemma-2/jax/paligemma2-3b-pt-224"
PRESET_28B = "keras/paligemma2/keras/pali_gemma2_28b_mix_224"
LOCATIONS = {
    "paligemma-3b-pt-224": HuggingFace(BASE),
    "PaliGemma-3B-PT-224": HuggingFace(BASE),
    BASE: HuggingFace(BASE),
    f"{BASE}-jax": HuggingFace(f"{BASE}-jax"),
    f"{BASE}-jax@float16": HuggingFace(f"{BASE}-jax", "float16"),
    f"{BASE}-keras": HuggingFace(BASE),
    f"hf://{BASE}@bfloat16": HuggingFace(BASE, "bfloat16"),
    f"https://huggingface.co/{BASE}": HuggingFace(BASE),
    f"https://huggingface.co/{BASE}/tree/bfloat16": HuggingFace(BASE, "bfloat16"),
    "https://hf.co/someone/tuned/": HuggingFace("someone/tuned"),
    "someone/tuned": HuggingFace("someone/tuned"),
    "pali_gemma_3b_224": HuggingFace(BASE),
    "pali_gemma_2_ft_docci_3b_448": HuggingFace("google/paligemma2-3b-ft-docci-448"),
    "keras/paligemma/keras/pali_gemma_3b_224": HuggingFace(BASE),
    f"kaggle://{PRESET_28B}/3": HuggingFace("google/paligemma2-28b-mix-224"),
    "paligemma-pretrains/20": HuggingFace("google/paligemma-3b-mix-448"),
    PG2: Kaggle(PG2),
    f"https://www.kaggle.com/models/{PG1}/2": Kaggle(PG1, 2),
    f"kaggle://{PG1}@float16": Kaggle(PG1, None, "float16"),
    "gs://bucket/a b.npz": Web("https://storage.googleapis.com/bucket/a%20b.npz"),
    f"gs://b/m.npz#sha256={'a' * 64}": Web("https://storage.googleapis.com/b/m.npz", "a" * 64),
    "https://example.com/m.npz": Web("https://example.com/m.npz"),
    f"https://x.com/m.npz#sha256={'a' * 64}": Web("https://x.com/m.npz", "a" * 64),
    "https://huggingface.co/a/b/resolve/main/m.npz": Web(
        "https://huggingface.co/a/b/resolve/main/m.npz"
    ),
}
NOT_NAMES = ("no-such-model", "google/paligemma2-3b-mix-484", "./someone/tuned", "tests/tuned",
             "a/b/c", "a/b/c/d", "/no/directory", "")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "location"), [*LOCATIONS.items(), *((name, None) for name in NOT_NAMES)]
)
def test_names_lead_to_locations(
    name: str, location: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tests").mkdir()  # a name that starts with a directory is a mistyped path
    monkeypatch.chdir(tmp_path)
    assert find_location(name) == location


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("http://example.com/m.npz", None, "https://example.com/m.npz"),
        ("ftp://example.com/m.npz", None, "no name or address"),
        ("hf://a/b/c", None, "no name or address"),
        (BASE, "../../secret", "no revision"),
        ("https://huggingface.co/..%2f../x", None, "no name or address"),
        ("https://www.kaggle.com/models/a/../jax/c", None, "no name or address"),
        (f"{BASE}@main", "float16", "Ask for one"),
        ("https://example.com/m.npz", "main", "no revisions"),
        ("google/paligemma/jax/paligemma-3b-pt-224", "v2", "no revision"),
        ("https://example.com/m.npz#sha256=12", None, "no checksum"),
    ],
)
def test_not_a_location(name: str, revision: str | None, words: str):
    with pytest.raises(CheckpointError, match=words):
        find_location(name, revision)


def test_typing_mistakes_ask_no_hub():
    for name, near in [
        ("google/paligemma2-3b-mix-484", "paligemma2-3b-mix-448"),
        ("demmo", "demo"),
    ]:
        with pytest.raises(CheckpointError, match=f"Did you mean {near}"):
            find_checkpoint(name)


HUB = ["README.md", ".gitattributes", "config.json", "generation_config.json", "tokenizer.json",
       "preprocessor_config.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
FOUND = ["config.json", "generation_config.json", "preprocessor_config.json"]


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        ([*HUB, *SHARDS, INDEX], [*FOUND, INDEX, "tokenizer.model", *SHARDS]),
        (
            [*HUB, "model.safetensors", "pytorch_model.bin", "model.onnx", "x.npz"],
            [*FOUND, "tokenizer.model", "model.safetensors"],
        ),
        (["a.npz", "a.bf16.npz", "a.f16.npz", "vae-oid.npz"], ["vae-oid.npz", "a.bf16.npz"]),
        (
            [f"a.b16.npz.part{i}" for i in (10, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)],
            [f"a.b16.npz.part{i}" for i in range(11)],
        ),
        (
            ["MANIFEST.json", "README.md", "config.json", "params/d/0"],
            ["MANIFEST.json", "config.json", "params/d/0"],
        ),
    ],
)
def test_only_what_is_needed(names: list[str], needed: list[str]):
    assert list(needed_files(names, "here")) == needed


def test_no_weights_that_can_be_read():
    with pytest.raises(CheckpointError, match="only model.weights.h5"):
        needed_files(["config.json", "model.weights.h5"], "here")


def test_precision_of_archives():
    names = ["a.npz", "a.b16.npz", "a.f16.npz"]
    assert choose_npz(names) == ("a.b16.npz",)
    assert choose_npz(names, "float32") == ("a.npz",)
    assert npz_names("m", "float16") == ("m.f16.npz",)
    assert npz_names("m", None) == ("m.b16.npz", "m.bf16.npz", "m.f16.npz")
