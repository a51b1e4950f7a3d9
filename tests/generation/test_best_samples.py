"""Several samples of each prompt: which they are, and in what order they come."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import decode as best_samples
from paligemma_jax.generation.constraints import forbid_tokens
from paligemma_jax.generation.decode import best_of, generate, read_prefix, sample_seeds
from paligemma_jax.generation.sampling import Greedy, Temperature
from paligemma_jax.generation.stop_strings import StopStrings
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import NO_EOS, rows_of
from tests.generation.speaking import babbler, questions, tokenizer
from tests.tiny import VOCAB, prompts

LENGTHS = [2, 5, 3]
SAMPLES = 3
WARM = Temperature(temperature=2.0)
draw = functools.partial(best_of, samples=SAMPLES, max_new_tokens=6, sampler=WARM)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, 6)


@pytest.fixture(scope="module")
def eos(tiny_model: PaliGemma, batch: Batch) -> int:
    """A piece at which some samples end early."""
    free = draw(tiny_model, batch, eos_id=NO_EOS)
    return free[0][0].tokens[2]


def test_samples_are_those_of_their_seeds(tiny_model: PaliGemma, batch: Batch, eos: int):
    """Each sample is what `generate` draws for the prompt alone with the sample's seed."""
    found = draw(tiny_model, batch, seed=[5, 6, 5], eos_id=eos)
    seeds = sample_seeds(np.array([5, 6, 5], np.uint32), SAMPLES).reshape(3, SAMPLES)
    for row, answers in enumerate(found):
        one = functools.partial(generate, tiny_model, max_new_tokens=6, sampler=WARM, eos_id=eos)
        alone = [one(rows_of(batch, [row]), seed=[int(seed)])[0] for seed in seeds[row]]
        assert sorted(a.tokens for a in answers) == sorted(a.tokens for a in alone)
        np.testing.assert_allclose(
            sorted(a.logprob for a in answers), sorted(a.logprob for a in alone), atol=1e-5
        )


def test_best_first(tiny_model: PaliGemma, batch: Batch, eos: int):
    def order(alpha: float) -> list[list[tuple[int, ...]]]:
        found = draw(tiny_model, batch, eos_id=eos, alpha=alpha)
        for answers in found:
            scores = [sum(a.logprobs) / len(a.tokens) ** alpha for a in answers]
            assert scores == sorted(scores, reverse=True)
        return [[a.tokens for a in answers] for answers in found]

    total, longest = order(0.0), order(9.0)
    assert [sorted(row) for row in total] == [sorted(row) for row in longest]
    assert total != longest
    assert len(longest[0][0]) == 6 and len(longest[0][-1]) < 6  # a short one comes last


def test_seeds_are_the_rows_own_first_and_all_different():
    seeds = sample_seeds(np.arange(50, dtype=np.uint32), 8)
    assert seeds.dtype == np.uint32
    np.testing.assert_array_equal(seeds[::8], np.arange(50))
    assert len(set(seeds.tolist())) == 400
    np.testing.assert_array_equal(sample_seeds(np.array([7], np.uint32), 3), seeds[56:59])


def test_one_sample_is_generate(tiny_model: PaliGemma, batch: Batch):
    asked: dict[str, Any] = dict(max_new_tokens=6, sampler=WARM, eos_id=NO_EOS, seed=3)
    (first, *_), *_ = best_of(tiny_model, batch, samples=1, **asked)
    assert first.tokens == generate(tiny_model, batch, **asked)[0].tokens
    greedy = best_of(tiny_model, batch, samples=1, sampler=Greedy(), max_new_tokens=6)
    plain = generate(tiny_model, batch, max_new_tokens=6)
    assert [row[0].tokens for row in greedy] == [row.tokens for row in plain]


def test_only_real_rows_and_constraints_by_row(tiny_model: PaliGemma, batch: Batch):
    mask = np.array([True, False, True])
    some = dataclasses.replace(batch, row_mask=mask)
    halves = [forbid_tokens(range(VOCAB // 2), VOCAB), forbid_tokens(range(20, VOCAB), VOCAB)]
    low, high = draw(tiny_model, some, constraint=halves, eos_id=NO_EOS)
    assert all(token >= VOCAB // 2 for answer in low for token in answer.tokens)
    assert all(token < 20 for answer in high for token in answer.tokens)
    assert len(low) == len(high) == SAMPLES


def test_prompts_are_read_once(tiny_model: PaliGemma, batch: Batch, monkeypatch):
    rows = []

    def read(model, batch, *args, **kw):
        rows.append(batch.tokens.shape[0])
        return read_prefix(model, batch, *args, **kw)

    monkeypatch.setattr(best_samples, "read_prefix", read)
    draw(tiny_model, batch, eos_id=NO_EOS)
    assert rows == [len(LENGTHS)]


def test_stop_strings_and_no_pictures():
    """What ended an answer counts in its rank."""
    batch = dataclasses.replace(questions(2), images=None)
    free = best_of(babbler(), batch, samples=4, max_new_tokens=12, eos_id=NO_EOS)
    text = tokenizer().decode(free[0][0].tokens)
    stop = StopStrings(tokenizer(), [text[0]])
    found = best_of(babbler(), batch, samples=4, max_new_tokens=12, eos_id=NO_EOS, stop=stop)
    assert any(a.stop and a.text_length == 0 and len(a.tokens) == 1 for a in found[0])
    for row in found:
        assert all(math.isfinite(a.logprob) and a.logprob < 0 for a in row)
        assert [a.logprob for a in row] == sorted((a.logprob for a in row), reverse=True)


def test_impossible_requests(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(ConfigError, match="0 samples by Temperature"):
        best_of(tiny_model, batch, samples=0)
    with pytest.raises(ConfigError, match="2 samples by Greedy"):
        best_of(tiny_model, batch, samples=2, sampler=Greedy())


def test_the_cache_of_every_sample_is_the_prompts(tiny_model: PaliGemma, batch: Batch):
    logits, cache = read_prefix(tiny_model, batch, room=4)
    more, many = best_samples._repeat(logits, cache, 2)
    for row in range(len(LENGTHS)):
        for copy in (2 * row, 2 * row + 1):
            np.testing.assert_array_equal(more[copy], logits[row])
            for layer in range(tiny_model.config.llm.depth):
                for wide, old in zip(many.read(layer), cache.read(layer), strict=True):
                    np.testing.assert_array_equal(wide[copy], old[row])
            np.testing.assert_array_equal(many.valid[copy], cache.valid[row])
            np.testing.assert_array_equal(many.positions[copy], cache.positions[row])
    assert int(many.length) == int(cache.length) and jnp.ndim(many.length) == 0
