"""The bicubic, one-piece processor against transformers' PaliGemmaProcessor, live."""

from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.processing.image import BICUBIC, ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs(golden: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.PaliGemmaProcessor.from_pretrained(golden / "huggingface")


@pytest.fixture(scope="module")
def ours(golden: Path) -> Processor:
    tokenizer = Tokenizer.from_file(golden / "huggingface" / "tokenizer.json")
    return Processor(tokenizer, ImagePreprocessing(28, BICUBIC), "huggingface")


@pytest.fixture(scope="module")
def picture(golden: Path) -> np.ndarray:
    with np.load(golden / "resize.golden.npz") as arrays:
        return arrays["cow_down/input"]


PROMPTS = ["caption en", "", "answer en where?", "ends in newline\n", "é 日本", "detect cat ; dog"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_pixels(theirs, ours, picture, prompt):
    wanted = theirs(images=picture, text=f"<image>{prompt}", return_tensors="np")
    batch = ours([picture], [prompt], min_length=64)
    ids = wanted["input_ids"][0]
    np.testing.assert_array_equal(batch.tokens[0][batch.mask_input[0]], ids[4:])  # 4 image tokens
    np.testing.assert_array_equal(batch.images[0], wanted["pixel_values"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("suffix", ["a cat", "<loc0001><loc0002><loc0003><loc0004> cat"])
def test_training_text(theirs, ours, picture, suffix):
    wanted = theirs(images=picture, text="<image>caption en", suffix=suffix, return_tensors="np")
    ids, answer = wanted["input_ids"][0][4:], wanted["token_type_ids"][0][4:]
    arrays = ours.encode_train("caption en", suffix, len(ids) - 1)
    np.testing.assert_array_equal(arrays["text"], ids)
    np.testing.assert_array_equal(arrays["mask_loss"], answer)
    np.testing.assert_array_equal(arrays["mask_ar"], answer)


def test_two_pictures(theirs, ours, picture):
    wanted = theirs(
        images=[[picture, picture[::-1]]], text=["<image><image>same?"], return_tensors="np"
    )
    batch = ours([[picture, picture[::-1]]], ["same?"])
    np.testing.assert_array_equal(batch.images[0], wanted["pixel_values"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(batch.tokens[0][batch.mask_input[0]], wanted["input_ids"][0][8:])
