"""Batches of prompts whose answers have begun already."""

import numpy as np
import pytest

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor

PROMPTS = ["caption en", "answer en where is the creature?", "ocr"]
BEGUN = ["a cat", "", "the creature"]


@pytest.fixture(scope="module")
def processor(tokenizer) -> Processor:
    return Processor(tokenizer, ImagePreprocessing(14))


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
