"""Batches of images and prompts, and how text is encoded."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.processing.image import BICUBIC, ImagePreprocessing
from paligemma_jax.processing.processor import Batch, Processor, bucket, group_by_image_count
from paligemma_jax.processing.tokenizer import Tokenizer

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
        ([RED], [None], "got NoneType"),
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
        InvalidImageError, match=r"^images\[1\]: .*text.png is not an image: it is text"
    ):
        processor([RED, tmp_path / "text.png"], ["ocr", "ocr"])
    with pytest.raises(InvalidImageError, match="^/.*text.png is not an image"):
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


PROMPTS = ["caption en", "answer en where is the creature?", "ocr"]
BEGUN = ["a cat", "", "the creature"]


def test_rows_are_those_of_encode_prompt(processor):
    batch = processor(None, PROMPTS, answers=BEGUN)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, BEGUN, strict=True)):
        alone = processor.encode_prompt(prompt, batch.tokens.shape[1], suffix=answer)
        np.testing.assert_array_equal(batch.tokens[row], alone["text"])
        np.testing.assert_array_equal(batch.mask_ar[row], alone["mask_ar"])
        np.testing.assert_array_equal(batch.mask_input[row], alone["mask_input"])


def test_the_beginning_is_causal_and_no_part_of_the_prompt(processor):
    batch = processor(None, ["ocr"], answers=["a cat"])
    plain = processor(None, ["ocr"])
    prompt = int(plain.mask_input[0].sum())
    end = int(batch.mask_input[0].sum())
    assert end == prompt + len(processor.tokenizer.encode("a cat"))
    np.testing.assert_array_equal(batch.tokens[0, :prompt], plain.tokens[0, :prompt])
    assert not batch.mask_ar[0, :prompt].any() and batch.mask_ar[0, prompt:].all()
    assert processor.tokenizer.eos_id not in batch.tokens[0]


def test_without_beginnings_nothing_changes(processor):
    plain = processor(None, PROMPTS)
    for answers in (None, ["", "", ""]):
        batch = processor(None, PROMPTS, answers=answers)
        np.testing.assert_array_equal(batch.tokens, plain.tokens)
        np.testing.assert_array_equal(batch.mask_ar, plain.mask_ar)


def test_room_is_made_for_the_beginning(processor):
    batch = processor(None, ["ocr"], answers=["cat " * 20])
    assert processor(None, ["ocr"]).tokens.shape == (1, 16)
    assert batch.tokens.shape == (1, 64) and batch.mask_input.sum() > 40


def test_beginnings_that_do_not_fit(processor, tokenizer):
    with pytest.raises(InvalidPromptError, match="3 prompts.*got 2"):
        processor(None, PROMPTS, answers=["a", "b"])
    with pytest.raises(InvalidPromptError, match="got one str"):
        processor(None, PROMPTS, answers="abc")
    small = Processor(tokenizer, ImagePreprocessing(14), max_text_length=20)
    with pytest.raises(InvalidPromptError, match="tokens with its answer prefix"):
        small(None, ["ocr"], answers=["cat " * 20])


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("model", ["tiny_gemma.model", "tiny_paligemma.model"])
def test_big_vision_golden(golden, model):
    tokenizer = Tokenizer.from_file(golden / model)
    processor = Processor(tokenizer, ImagePreprocessing(28))
    rows = json.loads((golden / "tokenize.golden.json").read_text())["rows"]
    assert len(rows) == 20
    for row in rows:
        train = processor.encode_train(row["prefix"], row["suffix"], row["text_len"], "truncate")
        prompt = processor.encode_prompt(row["prefix"], row["text_len"], "truncate")
        assert {k: v.tolist() for k, v in train.items()} == row["train"]
        assert {k: v.tolist() for k, v in prompt.items()} == row["eval"]
        assert all(v.dtype == np.int32 for v in [*train.values(), *prompt.values()])
        assert tokenizer.decode(train["text"]) == row["train_text_decoded"]


def test_truncation_is_never_silent(processor):
    assert len(processor.encode_train("caption en", "a cat", 11)["text"]) == 12
    with pytest.raises(InvalidPromptError, match=r"at most 6 tokens.*got \d+"):
        processor.encode_train("caption en", "a cat", 5)
    with pytest.raises(InvalidPromptError, match="at most 4 tokens"):
        processor.encode_prompt("caption en", 4)


@given(TEXT, TEXT, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_masks_agree_with_the_text(processor, prefix, suffix, length):
    arrays = processor.encode_train(prefix, suffix, length, "truncate")
    prompt = processor.prompt_ids(prefix)
    answer = [*processor.tokenizer.encode(suffix), 1]
    whole = prompt + answer + [0] * (length + 1)
    loss = [0] * len(prompt) + [1] * len(answer) + [0] * (length + 1)
    ar = [0] * len(prompt) + [1] * (len(answer) + length + 1)
    assert arrays["text"].tolist() == whole[: length + 1]
    assert arrays["mask_loss"].tolist() == loss[: length + 1]
    assert arrays["mask_ar"].tolist() == ar[: length + 1]


def test_prompt_can_begin_the_answer(processor):
    arrays = processor.encode_prompt("caption en", 16, suffix="a cat")
    prompt = processor.encode_prompt("caption en", 16)
    known = processor.tokenizer.encode("a cat")
    begin = int(prompt["mask_input"].sum())
    assert arrays["text"][begin : begin + len(known)].tolist() == known
    assert arrays["mask_input"].sum() == begin + len(known)
    assert arrays["mask_ar"].tolist() == prompt["mask_ar"].tolist()


def test_one_piece_merges_the_newline(tokenizer):
    three = Processor(tokenizer, ImagePreprocessing(28))
    one = dataclasses.replace(three, encoding="huggingface")
    assert one.prompt_ids("ocr") == three.prompt_ids("ocr")
    newline, double = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    assert len(newline) == len(double) == 1
    assert three.prompt_ids("ocr\n")[-2:] == newline * 2
    assert one.prompt_ids("ocr\n")[-1:] == double


def test_other_names_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="big_vision or huggingface, got 'keras'"):
        Processor(tokenizer, ImagePreprocessing(28), encoding="keras")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="'cut'"):
        Processor(tokenizer, ImagePreprocessing(28)).encode_prompt("ocr", 1, "cut")  # pyright: ignore
