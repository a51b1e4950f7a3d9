"""Prompt lookup gives the greedy answer, in fewer passes."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import prompt_lookup as lookup_loop
from paligemma_jax.generation.constraints import allowed_answers
from paligemma_jax.generation.decode import BoxEvidence, GeneratedTokens, generate
from paligemma_jax.generation.detection_grammar import detection_grammar
from paligemma_jax.generation.prompt_lookup import (
    LookedUpTokens,
    generate_by_lookup,
    object_kinds,
    object_reference,
)
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import NO_EOS, rows_of
from tests.generation.speaking import babbler, questions, tokenizer
from tests.goldens import assert_close
from tests.tiny import GEMMA, GEMMA2, prompts, random_images, random_model, tiny_config

WIDTH, ROWS, LONG = 8, 3, 32
MODELS = ["gemma", "gemma2", "gemma2-window"]


@functools.cache
def model_of(name: str) -> PaliGemma:
    llm = GEMMA if name == "gemma" else GEMMA2
    return random_model(tiny_config(llm, sliding_window=3 if name == "gemma2-window" else None))


def assert_same(found: list[LookedUpTokens], greedy: list[GeneratedTokens]) -> None:
    assert [row.tokens for row in found] == [row.tokens for row in greedy]
    for mine, wanted in zip(found, greedy, strict=True):
        assert_close(mine.logprobs, wanted.logprobs)
        assert 1 <= mine.passes <= len(mine.tokens)


def ask(rows: list[list[int]], images: np.ndarray) -> Batch:
    tokens = np.zeros((ROWS, WIDTH), np.int32)
    real = np.zeros((ROWS, WIDTH), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        real[i, : len(row)] = True
    return Batch(images=images, tokens=tokens, mask_ar=(~real).astype(np.int32), mask_input=real)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(3, 12), min_size=1, max_size=WIDTH), min_size=ROWS, max_size=ROWS
    ),
    name=st.sampled_from(MODELS),
    limit=st.integers(1, LONG),
    seed=st.integers(0, 1000),
)
def test_every_answer_is_the_greedy_one(rows: list[list[int]], name: str, limit: int, seed: int):
    model, batch = model_of(name), ask(rows, random_images(ROWS, seed=seed))
    limits: dict[str, Any] = dict(max_new_tokens=limit, eos_id=NO_EOS)
    greedy = generate(model, batch, **limits)
    assert_same(generate_by_lookup(model, batch, **limits), greedy)


@pytest.mark.parametrize(
    "name, guesses", [("gemma", 0), ("gemma2", 9), ("gemma2-window", 1), ("gemma2-window", 9)]
)
def test_any_number_of_guesses(name: str, guesses: int):
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_id=NO_EOS)
    greedy = generate(model_of(name), batch, **limits)
    found = generate_by_lookup(model_of(name), batch, **limits, guesses=guesses, longest=2)
    assert_same(found, greedy)
    if guesses == 0:
        assert [row.passes for row in found] == [LONG] * 3
        assert [row.tokens_a_pass for row in found] == [1.0] * 3
    else:
        assert min(row.passes for row in found) < LONG


@pytest.mark.parametrize("limit", [1, 32])
def test_answers_end_at_eos(tiny_model: PaliGemma, limit: int):
    """Also where it is among tokens that were guessed."""
    batch = prompts([2, 5, 8], WIDTH)
    free = generate(tiny_model, batch, max_new_tokens=LONG, eos_id=NO_EOS)
    for eos in sorted({token for row in free for token in row.tokens})[::8]:
        limits: dict[str, Any] = dict(max_new_tokens=limit, eos_id=eos)
        greedy = generate(tiny_model, batch, **limits)
        assert_same(generate_by_lookup(tiny_model, batch, **limits), greedy)


def test_rows_are_answered_as_alone(tiny_model: PaliGemma):
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_id=NO_EOS)
    together = generate_by_lookup(tiny_model, batch, **limits)
    assert len({row.passes for row in together}) > 1  # at different paces
    for i, row in enumerate(together):
        [alone] = generate_by_lookup(tiny_model, rows_of(batch, [i]), **limits)
        assert (alone.tokens, alone.passes) == (row.tokens, row.passes)
    some = dataclasses.replace(batch, row_mask=np.array([False, True, True]))
    assert [r.tokens for r in generate_by_lookup(tiny_model, some, **limits)] == [
        row.tokens for row in together[1:]
    ]


def test_with_grammar_and_evidence():
    """Boxes of a model that babbles: labels are guessed after any four locations."""
    labels = ["red circle", "blue square"]
    settings: dict[str, Any] = dict(
        max_new_tokens=64,
        constraint=detection_grammar(tokenizer(), labels),
        observer=BoxEvidence(tokenizer().loc_start),
    )
    greedy = generate(babbler(), questions(2), **settings)
    plain = generate_by_lookup(babbler(), questions(2), **settings)
    kinds = generate_by_lookup(
        babbler(),
        questions(2),
        **settings,
        kinds=object_kinds(tokenizer()),
        references=[object_reference(tokenizer(), labels)] * 2,
    )
    for found in (plain, kinds):
        assert_same(found, greedy)
        for mine, wanted in zip(found, greedy, strict=True):
            assert_close(mine.evidence, wanted.evidence)
    assert len(greedy[0].tokens) > 20
    assert sum(row.passes for row in kinds) < sum(row.passes for row in plain)


@pytest.mark.parametrize("masks", [False, True])
def test_the_reference_of_objects_is_one_of_each(masks: bool):
    text = tokenizer().decode(object_reference(tokenizer(), "cat ; red dog", masks=masks))
    body = "<loc0000>" * 4 + "<seg000>" * 16 * masks
    assert text == f"{body} cat ; {body} red dog ; "


def test_an_answer_given_as_reference_comes_in_few_passes(tiny_model: PaliGemma):
    """Also to one row of several; a wrong reference changes nothing but their number."""
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_id=NO_EOS, guesses=9)
    greedy = generate(tiny_model, batch, max_new_tokens=LONG, eos_id=NO_EOS)
    for references in ([row.tokens for row in greedy], [(), (), greedy[2].tokens], [(7,)] * 3):
        found = generate_by_lookup(tiny_model, batch, **limits, references=references)
        assert_same(found, greedy)
        if references[2] == greedy[2].tokens:
            assert found[2].passes < 10 and found[2].tokens_a_pass > 3
    with pytest.raises(ConfigError, match="2 references do not match 3 prompts"):
        generate_by_lookup(tiny_model, batch, references=[(), ()])


def test_a_constraint_of_each_row_and_a_least_length():
    texts = [["yes", "no"], ["red circle and blue square", "red circle and red circle"]]
    constraint = [allowed_answers(tokenizer(), row) for row in texts]
    settings: dict[str, Any] = dict(max_new_tokens=16, constraint=constraint)
    greedy = generate(babbler(), questions(2), **settings)
    assert_same(generate_by_lookup(babbler(), questions(2), **settings), greedy)
    settings = dict(max_new_tokens=16, min_new_tokens=12)
    greedy = generate(babbler(), questions(2), **settings)
    assert_same(generate_by_lookup(babbler(), questions(2), **settings), greedy)


def test_impossible_requests(tiny_model: PaliGemma):
    batch = prompts([2], WIDTH)
    with pytest.raises(ConfigError, match="-1 guesses from the last 4 tokens"):
        generate_by_lookup(tiny_model, batch, guesses=-1)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate_by_lookup(tiny_model, batch, max_new_tokens=0)


def test_different_prompts_compile_once(tiny_model: PaliGemma):
    def programs() -> int:
        return getattr(lookup_loop.decode_by_lookup, "_cache_size")()  # noqa: B009

    before = programs()
    for seed in range(4):
        batch = prompts([1 + seed, 7 - seed], WIDTH, seed=seed)
        generate_by_lookup(tiny_model, batch, max_new_tokens=3 + seed)
    assert programs() == before + 1
