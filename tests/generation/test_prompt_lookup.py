"""Prompt lookup gives the greedy sequence, in fewer passes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import allowed_answers
from paligemma_jax.generation.detection_grammar import detection_grammar
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.prompt_lookup import (
    NO_DRAFT,
    draft,
    lookup_steps,
    merge_classes,
    object_draft_corpus,
    object_token_classes,
    prompt_lookup_generate,
)
from paligemma_jax.generation.results import Generation
from paligemma_jax.generation.token_statistics import LocationStatistics
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.decoding import babbler, programs, questions, sequences_of, tokenizer
from tests.goldens import assert_close
from tests.tiny import GEMMA, GEMMA2, prompts, random_images, random_model, tiny_config

WIDTH, ROWS, LONG = 8, 3, 32
MODELS = ["gemma", "gemma2", "gemma2-window"]


@functools.cache
def model_of(name: str) -> PaliGemma:
    llm = GEMMA if name == "gemma" else GEMMA2
    return random_model(tiny_config(llm, sliding_window=3 if name == "gemma2-window" else None))


def passes_of(rows: list[Generation]) -> int:
    return sum(row.forward_passes or 0 for row in rows)


def assert_same(found: list[Generation], greedy: list[Generation]) -> None:
    assert [row.tokens for row in found] == [row.tokens for row in greedy]
    for mine, wanted in zip(found, greedy, strict=True):
        assert_close(mine.logprobs, wanted.logprobs)
        passes = mine.forward_passes
        assert passes is not None and 1 <= passes <= len(mine.tokens)


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
    limits: dict[str, Any] = dict(max_new_tokens=limit, eos_token_id=())
    greedy = generate(model, batch, **limits)
    assert_same(prompt_lookup_generate(model, batch, **limits), greedy)


@pytest.mark.parametrize(
    "name, drafts", [("gemma", 0), ("gemma2", 9), ("gemma2-window", 1), ("gemma2-window", 9)]
)
def test_any_number_of_draft_tokens(name: str, drafts: int):
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_token_id=())
    greedy = generate(model_of(name), batch, **limits)
    found = prompt_lookup_generate(
        model_of(name), batch, **limits, draft_tokens=drafts, max_ngram_size=2
    )
    assert_same(found, greedy)
    if drafts == 0:
        assert [row.forward_passes for row in found] == [LONG] * 3
        assert [row.tokens_per_forward_pass for row in found] == [1.0] * 3
    else:
        assert min(row.forward_passes or 0 for row in found) < LONG


@pytest.mark.parametrize("limit", [1, 32])
def test_answers_end_at_eos(tiny_model: PaliGemma, limit: int):
    """Also where it is among tokens that were guessed."""
    batch = prompts([2, 5, 8], WIDTH)
    free = generate(tiny_model, batch, max_new_tokens=LONG, eos_token_id=())
    for eos in sorted({token for row in free for token in row.tokens})[::8]:
        limits: dict[str, Any] = dict(max_new_tokens=limit, eos_token_id=eos)
        greedy = generate(tiny_model, batch, **limits)
        assert_same(prompt_lookup_generate(tiny_model, batch, **limits), greedy)


def test_rows_are_answered_as_alone(tiny_model: PaliGemma):
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_token_id=())
    together = prompt_lookup_generate(tiny_model, batch, **limits)
    assert len({row.forward_passes for row in together}) > 1  # at different paces
    for i, row in enumerate(together):
        [alone] = prompt_lookup_generate(tiny_model, sequences_of(batch, [i]), **limits)
        assert (alone.tokens, alone.forward_passes) == (row.tokens, row.forward_passes)
    some = dataclasses.replace(batch, row_mask=np.array([False, True, True]))
    assert [r.tokens for r in prompt_lookup_generate(tiny_model, some, **limits)] == [
        row.tokens for row in together[1:]
    ]


def test_with_grammar_and_statistics():
    """Boxes of a model that babbles: labels are drafted after any four locations."""
    labels = ["red circle", "blue square"]
    settings: dict[str, Any] = dict(
        max_new_tokens=64,
        constraint=detection_grammar(tokenizer(), labels),
        token_statistics=LocationStatistics(tokenizer().loc_start),
    )
    greedy = generate(babbler(), questions(2), **settings)
    plain = prompt_lookup_generate(babbler(), questions(2), **settings)
    kinds = prompt_lookup_generate(
        babbler(),
        questions(2),
        **settings,
        token_classes=object_token_classes(tokenizer()),
        draft_corpus=[object_draft_corpus(tokenizer(), labels)] * 2,
    )
    for found in (plain, kinds):
        assert_same(found, greedy)
        for mine, wanted in zip(found, greedy, strict=True):
            assert_close(mine.extras, wanted.extras)
    assert len(greedy[0].tokens) > 20
    assert passes_of(kinds) < passes_of(plain)


@pytest.mark.parametrize("masks", [False, True])
def test_the_reference_of_objects_is_one_of_each(masks: bool):
    text = tokenizer().decode(object_draft_corpus(tokenizer(), "cat ; red dog", masks=masks))
    body = "<loc0000>" * 4 + "<seg000>" * 16 * masks
    assert text == f"{body} cat ; {body} red dog ; "


def test_an_answer_given_as_reference_comes_in_few_passes(tiny_model: PaliGemma):
    """Also to one row of several; a wrong reference changes nothing but their number."""
    batch = prompts([2, 5, 8], WIDTH)
    limits: dict[str, Any] = dict(max_new_tokens=LONG, eos_token_id=(), draft_tokens=9)
    greedy = generate(tiny_model, batch, max_new_tokens=LONG, eos_token_id=())
    for references in ([row.tokens for row in greedy], [(), (), greedy[2].tokens], [(7,)] * 3):
        found = prompt_lookup_generate(tiny_model, batch, **limits, draft_corpus=references)
        assert_same(found, greedy)
        if references[2] == greedy[2].tokens:
            assert (found[2].forward_passes or 99) < 10 and found[2].tokens_per_forward_pass > 3
    with pytest.raises(ConfigError, match="each of 3 prompts, got 2"):
        prompt_lookup_generate(tiny_model, batch, draft_corpus=[(), ()])


def test_a_constraint_of_each_row_and_a_least_length():
    texts = [["yes", "no"], ["red circle and blue square", "red circle and red circle"]]
    constraint = [allowed_answers(tokenizer(), row) for row in texts]
    settings: dict[str, Any] = dict(max_new_tokens=16, constraint=constraint)
    greedy = generate(babbler(), questions(2), **settings)
    assert_same(prompt_lookup_generate(babbler(), questions(2), **settings), greedy)
    settings = dict(max_new_tokens=16, min_new_tokens=12)
    greedy = generate(babbler(), questions(2), **settings)
    assert_same(prompt_lookup_generate(babbler(), questions(2), **settings), greedy)


def test_impossible_requests(tiny_model: PaliGemma):
    batch = prompts([2], WIDTH)
    with pytest.raises(ConfigError, match="got -1 and 4"):
        prompt_lookup_generate(tiny_model, batch, draft_tokens=-1)
    with pytest.raises(ConfigError, match="max_new_tokens: expected"):
        prompt_lookup_generate(tiny_model, batch, max_new_tokens=0)


def test_different_prompts_compile_once(tiny_model: PaliGemma):
    before = programs(lookup_steps)
    for seed in range(4):
        batch = prompts([1 + seed, 7 - seed], WIDTH, seed=seed)
        prompt_lookup_generate(tiny_model, batch, max_new_tokens=3 + seed)
    assert programs(lookup_steps) == before + 1


def test_stop_strings_and_the_most_probable_tokens():
    how: dict[str, Any] = dict(max_new_tokens=24, eos_token_id=(), top_logprobs=2)
    free = generate(babbler(), questions(2), tokenizer(), **how)
    how["stop"] = free[0].text[5:8]
    greedy = generate(babbler(), questions(2), tokenizer(), **how)
    found = prompt_lookup_generate(babbler(), questions(2), tokenizer(), **how)
    assert [row.tokens for row in found] == [row.tokens for row in greedy]
    assert found[0].finish_reason == "stop" and found[0].text == greedy[0].text
    for mine, wanted in zip(found, greedy, strict=True):
        assert [top[0][0] for top in mine.top_logprobs] == [t[0][0] for t in wanted.top_logprobs]


TEXT, DRAFTS, LONGEST = 12, 5, 3
CLASSES = ((4, 6),)
_draft = jax.jit(
    lambda text, length, classes: draft(text, length, DRAFTS, LONGEST, classes), static_argnums=2
)


def searched(text: list[int], classes: tuple[tuple[int, int], ...]) -> list[int]:
    """The same, place by place."""
    keys = ["class" if any(a <= t < b for a, b in classes) else t for t in text]

    def run(tokens: list, end: int) -> int:
        for number in range(min(LONGEST, end), 0, -1):
            if tokens[end - number : end] == tokens[-number:]:
                return number
        return 0

    places = [(run(keys, end), run(text, end), end) for end in range(1, len(text))]
    number, _, end = max(places, default=(0, 0, 0))
    if number == 0:
        return [NO_DRAFT] * DRAFTS
    written = list(text)
    for i in range(DRAFTS):
        written.append(written[end + i])
    return written[len(text) :]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=TEXT), min_size=2, max_size=2),
    classes=st.sampled_from([(), CLASSES]),
)
def test_equals_a_search_place_by_place(
    rows: list[list[int]], classes: tuple[tuple[int, int], ...]
):
    text = np.full((2, TEXT), 3, np.int32)  # what stands behind the text does not matter
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    length = jnp.asarray([len(row) for row in rows])
    found = _draft(jnp.asarray(text), length, classes)
    assert found.tolist() == [searched(row, classes) for row in rows]


def test_a_repetition_goes_on():
    assert searched([7, 1, 2, 1, 2], ()) == [1, 2, 1, 2, 1]
    assert searched([7, 7], ()) == [7] * 5


def test_token_classes():
    tokens = jnp.asarray([0, 4, 5, 6, 9])
    assert merge_classes(tokens, ((4, 6), (9, 10))).tolist() == [0, -2, -2, 6, -3]
