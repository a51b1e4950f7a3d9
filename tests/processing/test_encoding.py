import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def processor(tokenizer) -> Processor:
    return Processor(tokenizer, ImagePreprocessing(28))


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
        Processor(tokenizer, ImagePreprocessing(28), encoding="keras")
    with pytest.raises(ConfigError, match="'cut'"):
        Processor(tokenizer, ImagePreprocessing(28)).encode_prompt("ocr", 1, "cut")
