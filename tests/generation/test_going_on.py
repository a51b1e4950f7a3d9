"""Answers that go on from a given beginning."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from paligemma_jax.generation.decode import generate, read_prefix
from paligemma_jax.generation.image_embeddings import encode, prepare
from paligemma_jax.generation.sampling import Temperature
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Batch, Processor
from tests.generation.answering import NO_EOS
from tests.generation.speaking import babbler, tokenizer
from tests.tiny import SIGLIP

PROMPTS = ["describe the scene", "read", "where is the circle"]
LENGTH = 10


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(tokenizer(), ImagePreprocessing(SIGLIP.image_size))


def pictures(number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(number)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return pictures(len(PROMPTS))


def begun(batch: Batch, beginnings: list[tuple[int, ...]]) -> Batch:
    """`batch`, each answer begun with the tokens given."""
    width = batch.tokens.shape[1] + max(map(len, beginnings))
    padded = ((0, 0), (0, width - batch.tokens.shape[1]))
    tokens, mask = np.pad(batch.tokens, padded), np.pad(batch.mask_input, padded)
    mask_ar = np.pad(batch.mask_ar, padded, constant_values=1)
    for row, ids in enumerate(beginnings):
        end = int(mask[row].sum())
        tokens[row, end : end + len(ids)] = ids
        mask[row, end : end + len(ids)] = True
    return dataclasses.replace(batch, tokens=tokens, mask_ar=mask_ar, mask_input=mask)


@pytest.mark.parametrize("with_images", [True, False], ids=["pictures", "text only"])
def test_going_on_is_what_would_have_come(processor, images, with_images: bool):
    """Greedy answers, cut anywhere and gone on from there, are whole again."""
    batch = processor(images if with_images else None, PROMPTS)
    asked: dict[str, Any] = dict(eos_id=NO_EOS)
    whole = generate(babbler(), batch, max_new_tokens=LENGTH, **asked)
    rows = begun(batch, [row.tokens[:n] for row, n in zip(whole, (1, 4, 0), strict=True)] + [()])
    rest = generate(babbler(), rows, max_new_tokens=LENGTH - 4, **asked)
    for row, answer, n in zip(rest, whole, (1, 4, 0), strict=True):
        assert row.tokens == answer.tokens[n : n + LENGTH - 4]
        np.testing.assert_allclose(row.logprobs, answer.logprobs[n : n + LENGTH - 4], atol=1e-4)


def test_the_prompt_does_not_see_the_beginning(processor, images):
    """Keys and values of picture and prompt are the same with it and without."""
    plain = processor(images, PROMPTS)
    batch = processor(images, PROMPTS, answers=["a red circle", "", "the square"])
    length = SIGLIP.num_patches + int(plain.mask_input[0].sum())
    _, before = read_prefix(babbler(), plain)
    _, after = read_prefix(babbler(), batch)
    for layer in range(babbler().config.llm.depth):
        for late, early in zip(after.read(layer), before.read(layer), strict=True):
            np.testing.assert_allclose(late[0, :, :length], early[0, :, :length], atol=1e-5)


def test_rows_with_and_without_a_beginning_answer_as_alone(processor, images):
    answers = ["a red circle", "", "the"]
    warm: dict[str, Any] = dict(
        max_new_tokens=LENGTH, sampler=Temperature(temperature=1.5), eos_id=NO_EOS
    )
    together = generate(babbler(), processor(images, PROMPTS, answers=answers), **warm)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        alone = processor([images[row]], [prompt], answers=[answer])
        assert generate(babbler(), alone, seed=row, **warm)[0].tokens == together[row].tokens
    without = generate(babbler(), processor(images, PROMPTS), **warm)
    assert without[1].tokens == together[1].tokens
    assert without[0].tokens != together[0].tokens


def test_with_pictures_encoded_before(processor, images):
    encoded = [encode(babbler(), processor.image, image) for image in images]
    answers = ["a red circle", "", "the"]
    batch, image_tokens = prepare(babbler(), processor, encoded, PROMPTS, answers=answers)
    assert image_tokens is not None
    asked: dict[str, Any] = dict(max_new_tokens=LENGTH, eos_id=NO_EOS)
    found = generate(babbler(), batch, image_tokens=image_tokens, **asked)
    direct = generate(babbler(), processor(images, PROMPTS, answers=answers), **asked)
    assert [row.tokens for row in found] == [row.tokens for row in direct]


def test_beginning_and_continuation_make_the_text(processor):
    """Spaces at the seam are in the continuation."""
    decode, ids = tokenizer().decode, tokenizer().encode("a red circle and a square")
    for cut in range(len(ids)):
        assert decode(ids[:cut]) + decode(ids[cut:]) == decode(ids)
