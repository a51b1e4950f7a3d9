"""Opening checkpoints, and what lies beside the weights."""

import json
import shutil
from pathlib import Path

import pytest

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.paligemma import parameter_count
from paligemma_jax.processing.image import BICUBIC, BILINEAR
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.checkpoint import describe, open_checkpoint
from paligemma_jax.weights.sidecar_files import (
    cache_bytes_per_token,
    parameter_counts,
    weight_bytes,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist. Expected a Hugging Face directory"),
        ("nowhere/model.npz", "does not exist"),
        ("", "is not a checkpoint: it is empty"),
        ("photo", "is not a checkpoint: it holds beach.jpg"),
        ("notes.txt", "is not an npz file; it begins with b'buy milk'"),
        ("x.safetensors", "is only a part of a checkpoint.*Pass the directory"),
        ("two", "holds 2 npz files: a.npz, b.npz"),
    ],
)
def test_paths_that_are_no_checkpoint(name: str, message: str, tmp_path: Path):
    if name:
        for directory, file in (("photo", "beach.jpg"), ("two", "a.npz"), ("two", "b.npz")):
            (tmp_path / directory).mkdir(exist_ok=True)
            (tmp_path / directory / file).touch()
        (tmp_path / "notes.txt").write_text("buy milk")
        (tmp_path / "x.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_descriptions(published: Path, pg2: PaliGemmaConfig):
    info = describe(published / "huggingface")
    assert (info.kind, info.config) == ("huggingface", pg2)
    assert info.dtypes == {"bfloat16": info.parameters}
    assert info.nbytes == 2 * info.parameters
    assert info.has_tokenizer and info.processor["encoding"] == "huggingface"
    assert describe(published / "model.npz").kind == "big_vision"
    assert describe(published).kind == "big_vision"  # a directory with one npz


def test_home_directories_are_known(published: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(published))
    assert open_checkpoint("~/model.npz").kind == "big_vision"


def processor(path: Path) -> Processor:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer is not None
    return Processor.from_dict(checkpoint.processor_settings, checkpoint.tokenizer)


def test_each_format_brings_its_own_ways(published: Path):
    big_vision, hugging_face = (
        processor(published / "model.npz"),
        processor(published / "huggingface"),
    )
    assert (big_vision.image.method, big_vision.encoding) == (
        BILINEAR,
        "big_vision",
    )
    assert (hugging_face.image.method, hugging_face.encoding) == (BICUBIC, "huggingface")
    assert big_vision.image.size == hugging_face.image.size == 28


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published / "huggingface", tmp_path / "copy"))


def test_settings_of_transformers_5(copy: Path):
    old = copy / "preprocessor_config.json"
    settings = json.loads(old.read_text())
    old.unlink()
    expected = processor(copy)  # without settings, those of all published checkpoints
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert processor(copy).to_dict() == expected.to_dict()
    settings["resample"] = 2
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(CheckpointError, match="processor_config.json has other settings"):
        processor(copy)


def test_every_other_setting_is_named(copy: Path, edit_json):
    with edit_json(copy / "preprocessor_config.json") as settings:
        settings["resample"] = 0
        settings["image_mean"] = [0.48, 0.46, 0.41]
        settings["size"] = {"height": 56, "width": 56}
        settings["rescale_factor"] = 1 / 127.5
    with pytest.raises(CheckpointError) as error:
        processor(copy)
    for problem in (
        "(4 problems)",
        "resample is 0, only 3 is supported",
        "image_mean is [0.48, 0.46, 0.41]",
        "size is 56, the weights are for 28",
        "rescale_factor is",
    ):
        assert problem in str(error.value)


def test_a_damaged_tokenizer(copy: Path):
    (copy / "tokenizer.model").write_text("<html>")
    checkpoint = open_checkpoint(copy)  # weights alone do not need it
    with pytest.raises(CheckpointError, match="tokenizer.model is text, not a SentencePiece model"):
        _ = checkpoint.tokenizer


@pytest.mark.parametrize("name", ["paligemma-3b-pt-896", "paligemma2-10b-pt-224"])
def test_parts_add_up_to_the_model(name: str):
    counts = parameter_counts(VARIANTS[name])
    assert sum(counts.values()) == parameter_count(VARIANTS[name])
    assert set(counts) == {"image encoder", "projection", "token embeddings", "decoder layers"}


def test_bytes():
    config = VARIANTS["paligemma-3b-pt-224"]
    assert weight_bytes(config)["bfloat16"] == 2 * 2_923_335_408
    assert weight_bytes(config)["int4"] * 4 == weight_bytes(config)["bfloat16"]
    assert cache_bytes_per_token(config.llm, 16) == 2 * 18 * 1 * 256 * 2
