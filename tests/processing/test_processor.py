import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.processing.image import BICUBIC, ImagePreprocessing
from paligemma_jax.processing.processor import (
    Batch,
    Processor,
    bucket,
    group_by_image_count,
)

RED, BLUE = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (9, 9), "blue")


@pytest.fixture(scope="module")
def processor(tokenizer) -> Processor:
    return Processor(tokenizer, ImagePreprocessing(14))


def test_shapes_types_and_rows(processor):
    batch = processor([RED, BLUE, RED], ["caption en", "answer en what colour is it?", ""])
    assert batch.images.shape == (4, 1, 14, 14, 3) and batch.images.dtype == np.float32
    assert batch.tokens.shape == batch.mask_ar.shape == batch.mask_input.shape == (4, 16)
    assert batch.tokens.dtype == batch.mask_ar.dtype == np.int32
    assert batch.mask_input.dtype == bool and batch.mask_loss is None
    assert batch.row_mask.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(batch.images[3], batch.images[0])
    np.testing.assert_array_equal(batch.images[1, 0, 0, 0], [-1, -1, 1])
    single = processor.encode_prompt("caption en", 16)
    np.testing.assert_array_equal(batch.tokens[0], single["text"])
    np.testing.assert_array_equal(batch.mask_ar[0], single["mask_ar"])
    np.testing.assert_array_equal(batch.mask_input[0], single["mask_input"])
    assert batch.mask_input[2].sum() == 2  # an empty prompt is bos and newline


def test_batch_is_a_pytree(processor):
    batch = processor([RED], ["ocr"])
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    assert isinstance(doubled, Batch) and doubled.tokens.shape[0] == 2
    assert jax.jit(lambda b: b.tokens.sum())(batch) == batch.tokens.sum()
    text_only = processor(None, ["ocr"])
    assert text_only.images is None and len(jax.tree.leaves(text_only)) == 4


@pytest.mark.parametrize(
    "entry", [[RED, BLUE], (RED, BLUE), np.stack([np.zeros((4, 4, 3), np.uint8)] * 2)]
)
def test_several_pictures_or_frames(processor, entry):
    assert processor([entry], ["caption en"]).images.shape == (1, 2, 14, 14, 3)


def test_video_arrays_keep_their_frames_apart(processor):
    videos = [np.full((3, 4, 4, 3), value, np.uint8) for value in (0, 51, 102, 255)]
    images = processor(videos, ["caption en"] * 4).images
    assert [round(float(row.mean()), 3) for row in images] == [-1.0, -0.6, -0.2, 1.0]
    assert np.ptp(images, axis=(1, 2, 3, 4)).max() == 0


def test_batch_rows_equal_single_rows(processor):
    prompts = ["caption en", "answer en where is the creature?"]
    together = processor([RED, BLUE], prompts)
    for row, (image, prompt) in enumerate(zip((RED, BLUE), prompts, strict=True)):
        alone = processor([image], [prompt])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(together.images[row], alone.images[0])


def test_few_shapes(processor):
    shapes = {processor(None, ["cat " * n]).tokens.shape for n in range(1, 80)}
    assert shapes == {(1, 16), (1, 32), (1, 64), (1, 128), (1, 256)}
    assert processor(None, ["ocr"], min_length=64).tokens.shape == (1, 64)
    assert {bucket(n) for n in range(1, 9)} == {1, 2, 4, 8}


def test_limit_bounds_the_bucket(tokenizer):
    processor = Processor(tokenizer, ImagePreprocessing(14), max_text_length=20)
    prompt = "cat " * 8
    assert 16 < processor(None, [prompt]).mask_input.sum() <= 20
    assert processor(None, [prompt]).tokens.shape == (1, 20)


def test_long_prompt_is_refused(processor):
    with pytest.raises(InvalidPromptError, match=r"1,\d+ tokens.*at most 512"):
        processor([RED], ["cat " * 600])
    with pytest.raises(InvalidPromptError, match="4,000,000 characters.*at most 512"):
        processor([RED], ["cat " * 1_000_000])


def test_control_text_changes_nothing_else(processor):
    batch = processor([RED], ["<image><eos><bos><pad>"], min_length=64)
    tokens = batch.tokens[0][batch.mask_input[0]]
    assert tokens[0] == 2 and tokens[1:].min() > 3
    assert batch.images.shape[1] == 1


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (RED, "ocr", "two lists"),
        ("cat.jpg", ["ocr"], "two lists"),
        ([RED], "ocr", "two lists"),
        ([RED], ["ocr", "ocr"], "got 1 for 2 prompts"),
        ([], [], "at least one prompt"),
        ([RED, None], ["ocr", "ocr"], "1 for prompt 0, 0 for prompt 1"),
        ([RED, [RED, RED]], ["ocr", "ocr"], "group_by_image_count"),
        ([RED], [None], "NoneType is no text"),
    ],
)
def test_bad_batches(processor, images, prompts, message):
    with pytest.raises(InvalidPromptError, match=message):
        processor(images, prompts)


def test_groups():
    assert group_by_image_count([RED, None, [RED, RED], BLUE, []]) == {1: [0, 3], 0: [1, 4], 2: [2]}


def test_bad_picture_is_named(processor, tmp_path: Path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(
        InvalidImageError, match=r"^images\[1\]: .*text.png is no picture: it is text"
    ):
        processor([RED, tmp_path / "text.png"], ["ocr", "ocr"])
    with pytest.raises(InvalidImageError, match="^/.*text.png is no picture"):
        processor([tmp_path / "text.png"], ["ocr"])


def test_equal_pictures_are_read_once(processor, monkeypatch):
    calls = []
    original = ImagePreprocessing.preprocess
    monkeypatch.setattr(
        ImagePreprocessing, "preprocess", lambda *a: calls.append(1) or original(*a)
    )
    processor([RED] * 4, ["ocr"] * 4)
    assert len(calls) == 1


def test_dict_round_trip(processor, tokenizer):
    other = Processor(tokenizer, ImagePreprocessing(448, BICUBIC), "huggingface", 128)
    for one in (processor, other):
        values = json.loads(json.dumps(one.to_dict()))
        assert Processor.from_dict(values, tokenizer) == one
    assert other.to_dict() == {
        "image": {"size": 448, "method": "bicubic-pil"},
        "encoding": "huggingface",
        "max_text_length": 128,
    }
    short = {"image": {"size": 448, "method": "bicubic-pil"}, "encoding": "huggingface"}
    assert Processor.from_dict(short, tokenizer).max_text_length == 512
    with pytest.raises(ConfigError, match="lack image and encoding"):
        Processor.from_dict({}, tokenizer)
