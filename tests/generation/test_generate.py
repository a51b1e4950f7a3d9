"""`generate`: from a batch to answers as Python values."""

import dataclasses
import functools

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import decode as loop
from paligemma_jax.generation.decode import GeneratedTokens, generate
from paligemma_jax.generation.sampling import Temperature
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import NO_EOS, answer, rows_of
from tests.tiny import prompts

LENGTHS = [2, 5, 3, 6]
WARM = Temperature(temperature=2.0)
draw = functools.partial(generate, max_new_tokens=8, sampler=WARM, eos_id=NO_EOS)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, 6)


@pytest.fixture(scope="module")
def free(tiny_model: PaliGemma, batch: Batch) -> list[GeneratedTokens]:
    """Answers of a model that knows no end."""
    return generate(tiny_model, batch, max_new_tokens=8, eos_id=NO_EOS)


def test_answers_are_those_of_the_loop(
    tiny_model: PaliGemma, batch: Batch, free: list[GeneratedTokens]
):
    tokens, logprobs, _ = answer(tiny_model, batch)
    assert [list(row.tokens) for row in free] == tokens.tolist()
    np.testing.assert_allclose([row.logprobs for row in free], logprobs, atol=1e-5)
    assert all(type(token) is int for row in free for token in row.tokens)


def test_answers_end_with_eos(tiny_model: PaliGemma, batch: Batch, free: list[GeneratedTokens]):
    eos = free[0].tokens[2]
    ended = generate(tiny_model, batch, max_new_tokens=8, eos_id=eos)
    for row, whole in zip(ended, free, strict=True):
        end = whole.tokens.index(eos) + 1 if eos in whole.tokens else 8
        assert row.tokens == whole.tokens[:end] and len(row.logprobs) == end


def test_only_real_rows_are_answered(
    tiny_model: PaliGemma, batch: Batch, free: list[GeneratedTokens]
):
    """And seeds go to the real rows in their order."""
    mask = np.array([False, True, False, True])
    some = dataclasses.replace(batch, row_mask=mask)
    assert [row.tokens for row in generate(tiny_model, some, max_new_tokens=8, eos_id=NO_EOS)] == [
        free[1].tokens,
        free[3].tokens,
    ]
    drawn = draw(tiny_model, some, seed=[7, 8])
    every = draw(tiny_model, batch, seed=[0, 7, 0, 8])
    assert [row.tokens for row in drawn] == [every[1].tokens, every[3].tokens]


def test_one_seed_counts_up_over_the_rows(tiny_model: PaliGemma, batch: Batch):
    same = rows_of(batch, [1, 1, 1])
    counted = draw(tiny_model, same, seed=5)
    assert counted == draw(tiny_model, same, seed=[5, 6, 7])
    assert len({row.tokens for row in counted}) == 3


def test_a_prompt_without_images(tiny_model: PaliGemma, batch: Batch):
    text = dataclasses.replace(batch, images=None)
    without = generate(tiny_model, text, max_new_tokens=3, eos_id=NO_EOS)
    no_images = dataclasses.replace(batch, images=np.asarray(batch.images)[:, :0])
    assert without == generate(tiny_model, no_images, max_new_tokens=3, eos_id=NO_EOS)
    assert without != generate(tiny_model, batch, max_new_tokens=3, eos_id=NO_EOS)


def test_impossible_requests(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(tiny_model, batch, max_new_tokens=0)
    with pytest.raises(ConfigError, match="3 seeds do not match 4 prompts"):
        generate(tiny_model, batch, seed=[1, 2, 3])


def test_a_stream_of_requests_compiles_two_programs(tiny_model: PaliGemma):
    def programs() -> int:
        return sum(getattr(f, "_cache_size")() for f in (loop.prefill, loop.decode))  # noqa: B009

    before = programs()
    for seed in range(5):
        batch = prompts([1 + seed, 7 - seed], 8, number_of_images=2, seed=seed)
        generate(tiny_model, batch, max_new_tokens=3 + 3 * seed, sampler=WARM, seed=seed)
    assert programs() == before + 2
