"""Prompt templates, and the labels and candidate answers that users give."""

import dataclasses
from pathlib import Path

import pytest

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.prompts import candidate_tokens, check_labels
from paligemma_jax.processing.tokenizer import Tokenizer


def test_task_language():
    assert prompts.caption() == "caption en"
    assert prompts.caption("pt-BR") == "caption pt-BR"
    assert prompts.answer(" what is it? ", "de") == "answer de what is it?"
    assert prompts.count("red cats") == "answer en how many red cats are there?"
    assert prompts.ocr() == "ocr"
    assert prompts.detect("cat") == "detect cat"
    assert prompts.detect(["cat", " big dog "]) == "detect cat ; big dog"
    assert prompts.detect("cat;big dog") == "detect cat ; big dog"
    assert prompts.segment(("cat", "dog")) == "segment cat ; dog"


@pytest.mark.parametrize("language", ["", "e", "english please", "en\n", None, "en;"])
def test_bad_language(language):
    with pytest.raises(InvalidPromptError, match="language code"):
        prompts.caption(language)


@pytest.mark.parametrize("text", ["", "  \n", None, 3])
def test_empty_text(text):
    for build in (prompts.answer, prompts.count):
        with pytest.raises(InvalidPromptError, match="Expected words"):
            build(text)


@pytest.mark.parametrize(
    "labels", ["", [], ["cat", ""], ["cat ; dog"], "a;", "a\nb", ["a\nb"], [None]]
)
def test_bad_labels(labels):
    for build in (prompts.detect, prompts.segment):
        with pytest.raises(InvalidPromptError, match="Expected"):
            build(labels)


TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(Tokenizer.from_file(TOKENIZER), ImagePreprocessing(8), max_text_length=12)


def test_tokens_end_with_eos(processor: Processor):
    words = processor.tokenizer.encode("red circle")
    assert candidate_tokens(processor, ("red circle", ""), 3) == [[*words, 1], [1]]


def test_what_just_fits(processor: Processor):
    longest = candidate_tokens(processor, ["no " * 4], 0)[0]
    room = processor.max_text_length - len(longest)
    assert candidate_tokens(processor, ["no " * 4], room) == [longest]
    with pytest.raises(
        InvalidPromptError, match=rf"Candidate 0 has {len(longest)} tokens.* of {room + 1}\."
    ):
        candidate_tokens(processor, ["no " * 4], room + 1)


@pytest.mark.parametrize("long", ["star " * 20, "x" * 10**6], ids=["tokens", "characters"])
def test_too_long(processor: Processor, long: str):
    with pytest.raises(InvalidPromptError, match="Candidate 1 has .* at most 12 tokens"):
        candidate_tokens(processor, ["yes", long], 3)
    roomy = dataclasses.replace(processor, max_text_length=10**7)
    assert len(candidate_tokens(roomy, [long], 3)) == 1


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([], "an empty list"),
        ("yes", "got 'yes'"),
        (None, "of type NoneType"),
        ([3], "got int"),
        (["half \ud800"], "half a character"),
    ],
)
def test_candidates_that_do_not_fit(processor: Processor, candidates, message: str):
    with pytest.raises(InvalidPromptError, match=message):
        candidate_tokens(processor, candidates, 3)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([], "an empty list"),
        ("cat", "'cat'"),
        (None, "of type NoneType"),
        (["cat", " "], "label 1, got ' '"),
        (["cat", 3], "label 1, got 3"),
        (["cat", "dog", "cat"], "twice, as number 0 and 2"),
    ],
)
def test_labels_that_do_not_fit(labels, message: str):
    with pytest.raises(InvalidPromptError, match=message):
        check_labels(labels)
