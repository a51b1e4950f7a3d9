"""Beam search finds the best sequences, and the same ones whatever else is asked."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.beam_search import BeamPlan, beam_search
from paligemma_jax.generation.beam_search import search as search_program
from paligemma_jax.generation.constraints import allow_tokens, allowed_answers, forbid_tokens
from paligemma_jax.generation.decode import DecodePlan, prefill, read_prompts
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.results import Generation
from paligemma_jax.generation.scoring import score_tokens
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.decoding import babbler, padded, programs, questions, sequences_of, tokenizer
from tests.goldens import BIG_VISION, assert_close, big_vision, optimized, prompt
from tests.tiny import EOS, GEMMA2, VOCAB, prompts, random_model, tiny_config

LENGTHS = [2, 5, 3, 6]
search = functools.partial(
    beam_search, max_new_tokens=8, length_penalty=1.0, num_return_sequences=3
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, 6)


@pytest.fixture(scope="module")
def found(tiny_model: PaliGemma, batch: Batch) -> list[list[Generation]]:
    rows = search(tiny_model, batch)
    assert len({tuple(a.tokens for a in row) for row in rows}) == len(rows)  # all different
    assert any(len(row[-1].tokens) > 2 for row in rows)
    return rows


def tokens_of(rows: list[list[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[answer.tokens for answer in row] for row in rows]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0])
def test_a_search_of_full_width_is_exhaustive(tiny_model: PaliGemma, batch: Batch, alpha: float):
    """All 1 + 63 answers that end within two tokens, ranked as `score_tokens` ranks them."""
    every = [[EOS], *([token, EOS] for token in range(VOCAB) if token != EOS)]
    scored = score_tokens(tiny_model, batch, [every] * len(LENGTHS))
    rows = beam_search(
        tiny_model,
        batch,
        num_beams=VOCAB - 1,
        max_new_tokens=2,
        length_penalty=alpha,
        num_return_sequences=10,
    )
    for row, logprobs in zip(rows, scored, strict=True):
        scores = [sum(p) / len(p) ** alpha for p in logprobs]
        best = np.argsort(scores)[::-1][:10]
        assert [list(answer.tokens) for answer in row] == [every[i] for i in best]
        assert_close([answer.score for answer in row], [scores[i] for i in best])


def test_log_probabilities_are_those_of_the_whole_answers(
    tiny_model: PaliGemma, batch: Batch, found: list[list[Generation]]
):
    scored = score_tokens(tiny_model, batch, tokens_of(found))
    for row, logprobs in zip(found, scored, strict=True):
        assert [a.tokens.index(EOS) + 1 for a in row] == [len(a.tokens) for a in row]
        assert_close([a.logprob for a in row], [sum(p) for p in logprobs])
        assert_close([a.score for a in row], [a.logprob / len(a.tokens) for a in row])
        assert all(len(a.logprobs) == len(a.tokens) for a in row)
        assert [a.score for a in row] == sorted([a.score or 0.0 for a in row], reverse=True)
        assert len({a.tokens for a in row}) == 3


@pytest.mark.parametrize("window", [None, 3])
def test_one_beam_is_greedy(window: int | None):
    model = random_model(tiny_config(GEMMA2, sliding_window=window))
    batch = prompts([1, 2, 3, 4, 5, 6, 7, 8], 8)
    free = [row.tokens for row in generate(model, batch, max_new_tokens=8, eos_token_id=())]
    usual = max(range(VOCAB), key=[token for row in free for token in row[1:]].count)
    for eos in (usual, free[0][0], ()):
        greedy = generate(model, batch, max_new_tokens=8, eos_token_id=eos)
        rows = beam_search(
            model, batch, num_beams=1, max_new_tokens=8, early_stopping=False, eos_token_id=eos
        )
        assert [[row.tokens] for row in greedy] == tokens_of(rows)
        assert_close([sum(row.logprobs) for row in greedy], [row[0].logprob for row in rows])
        assert {row.finish_reason for row in greedy} >= {"eos" if eos else "length"}


def test_more_beams_find_likelier_answers(tiny_model: PaliGemma, batch: Batch):
    wide, narrow = (
        beam_search(
            tiny_model,
            batch,
            num_beams=beams,
            max_new_tokens=8,
            early_stopping=False,
            eos_token_id=(),
        )
        for beams in (16, 1)
    )
    gained = [w[0].logprob - n[0].logprob for w, n in zip(wide, narrow, strict=True)]
    assert min(gained) > -1e-4 and max(gained) > 0.1


def test_an_end_that_is_not_likely_counts_only_anytime(tiny_model: PaliGemma, batch: Batch):
    """And what has not ended counts only where the search does not stop early."""
    how: dict[str, Any] = dict(num_beams=2, num_return_sequences=2, max_new_tokens=3)
    anytime = search(tiny_model, batch, eos_token_id=EOS, **how)
    ranked = search(tiny_model, batch, eos_token_id=EOS, early_stopping=False, **how)
    assert all(a.tokens[-1] == EOS for row in anytime for a in row)
    assert any(a.tokens[-1] != EOS and len(a.tokens) == 3 for row in ranked for a in row)
    scored = score_tokens(tiny_model, batch, tokens_of(ranked))
    for row, logprobs in zip(ranked, scored, strict=True):
        assert_close([a.logprob for a in row], [sum(p) for p in logprobs])


def test_a_row_alone_is_answered_as_in_a_ragged_batch(
    tiny_model: PaliGemma, batch: Batch, found: list[list[Generation]]
):
    for row in range(len(LENGTHS)):
        alone = search(tiny_model, sequences_of(batch, [row]))
        assert tokens_of(alone) == tokens_of(found[row : row + 1])
        assert_close([a.score for a in alone[0]], [a.score for a in found[row]], atol=1e-5)


def test_padding_order_and_filling_rows_change_nothing(
    tiny_model: PaliGemma, batch: Batch, found: list[list[Generation]]
):
    assert tokens_of(search(tiny_model, padded(batch, 5))) == tokens_of(found)
    real = np.array([True, False, True, False])
    some = dataclasses.replace(sequences_of(batch, [3, 2, 1, 0]), row_mask=real)
    assert tokens_of(search(tiny_model, some)) == tokens_of([found[3], found[1]])


def test_encoded_pictures(tiny_model: PaliGemma, batch: Batch, found: list[list[Generation]]):
    tokens = tiny_model.encode_images(jnp.asarray(batch.images))
    text = dataclasses.replace(batch, images=None)
    assert tokens_of(search(tiny_model, text, image_tokens=tokens)) == tokens_of(found)
    assert tokens_of(search(tiny_model, text)) != tokens_of(found)


def test_a_token_mask(tiny_model: PaliGemma, batch: Batch):
    """The best of what it allows, with the model's log-probabilities."""
    some = [7, 8, 9]
    every = [[*middle, EOS] for n in range(3) for middle in itertools.product(some, repeat=n)]
    scored = score_tokens(tiny_model, batch, [every] * len(LENGTHS))
    constraint = allow_tokens([*some, EOS], VOCAB)
    rows = beam_search(
        tiny_model,
        batch,
        num_beams=len(every),
        max_new_tokens=3,
        num_return_sequences=len(every),
        constraint=constraint,
    )
    for row, logprobs in zip(rows, scored, strict=True):
        scores = [sum(p) for p in logprobs]
        best = np.argsort(scores)[::-1]
        assert [list(answer.tokens) for answer in row] == [every[i] for i in best]
        assert_close([answer.logprob for answer in row], np.sort(scores)[::-1])


def test_no_answer_ends(tiny_model: PaliGemma, batch: Batch):
    rows = search(tiny_model, batch, constraint=forbid_tokens([EOS], VOCAB))
    assert rows == [[]] * len(LENGTHS)


def test_allowed_answers_of_each_row():
    """With as many beams as answers all are found, where greedy decoding takes one."""
    texts = [["yes", "no", "red circle"], ["red", "red circle and blue square", "blue"]]
    constraints = [allowed_answers(tokenizer(), row) for row in texts]
    rows = beam_search(
        babbler(),
        questions(2),
        num_beams=4,
        max_new_tokens=8,
        num_return_sequences=3,
        constraint=constraints,
    )
    for row, wanted in zip(rows, texts, strict=True):
        assert {tokenizer().decode(answer.tokens) for answer in row} == set(wanted)


def test_impossible_requests(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(ConfigError, match="num_beams: expected less than the 64 tokens"):
        beam_search(tiny_model, batch, num_beams=64)


def test_different_prompts_compile_once(tiny_model: PaliGemma):
    before = programs(search_program)
    for seed in range(4):
        other = prompts([1 + seed, 7 - seed], 8, seed=seed)
        beam_search(tiny_model, other, max_new_tokens=3 + seed, length_penalty=0.3 * seed)
    assert programs(search_program) == before + 1


def test_no_keys_or_values_are_copied(tiny_model: PaliGemma, batch: Batch):
    """The cache is updated in place, and there is no second one."""
    room, rows = 512, jnp.ones(len(LENGTHS), bool)
    decoding = DecodePlan.greedy(len(LENGTHS), room)
    plan = BeamPlan(decoding, jnp.asarray(0.0), 4, 1, early_stopping=True)
    logits, cache = read_prompts(tiny_model, batch, room=4 * room)
    arrays, shape = jax.tree.flatten(cache)

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(
            search_program(tiny_model, plan, shape.unflatten(arrays), logits, rows, room)
        )

    memory = jax.jit(run, donate_argnums=0).lower(arrays).compile().memory_analysis()
    size = cache.nbytes
    assert memory is not None and memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size


def test_each_sequence_has_its_own_limits_and_ends(tiny_model: PaliGemma, batch: Batch):
    """With both rules, and as each alone."""
    own: dict[str, Any] = dict(
        max_new_tokens=[2, 8, 5, 3],
        min_new_tokens=[0, 4, 0, 2],
        eos_token_id=[[1], [9, 5], [7], []],
    )
    for early_stopping in (True, False):
        together = search(tiny_model, batch, early_stopping=early_stopping, **own)
        for i, row in enumerate(together):
            alone: dict[str, Any] = {name: values[i] for name, values in own.items()}
            one = sequences_of(batch, [i])
            found = search(tiny_model, one, early_stopping=early_stopping, **alone)
            assert tokens_of(found) == [[a.tokens for a in row]]
            for a in row:
                assert len(a.tokens) <= own["max_new_tokens"][i]
                assert len(a.tokens) > own["min_new_tokens"][i] or a.finish_reason == "length"


@pytest.mark.parametrize("name", BIG_VISION)
def test_big_vision(name: str):
    """big_vision leaves the first token's logits uncapped, here a second model imitates that."""
    golden, beams, limit = big_vision(name), 4, 8
    model = golden.model(final_logit_softcap=0.0)
    capped = golden.model(final_logit_softcap=30.0 if name == "pg2_softcap" else 0.0)
    images, tokens, *masks = prompt(golden)
    slots = images.shape[1] * model.config.img.num_patches + tokens.shape[1] + beams * limit
    with optimized():
        logits, cache = prefill(model, images, tokens, *masks, slots)
    decoding = DecodePlan.greedy(len(tokens), limit)
    plan = BeamPlan(decoding, jnp.asarray(0.0), beams, 1, early_stopping=True)
    finished, _ = search_program(capped, plan, cache, logits, jnp.ones(len(tokens), bool), limit)
    np.testing.assert_array_equal(finished.tokens[:, 0], golden["beam4_tokens"])
    np.testing.assert_allclose(finished.score, finished.logprobs.sum(axis=2), atol=1e-4)
