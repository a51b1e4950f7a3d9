import json
import shutil
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.image import BICUBIC, BILINEAR
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.checkpoint import open_checkpoint


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
