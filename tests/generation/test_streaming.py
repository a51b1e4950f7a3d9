"""Streaming gives the text of `generate`, in whole characters, and stops when nobody listens."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import streaming
from paligemma_jax.generation.constraints import allowed_answers
from paligemma_jax.generation.decode import (
    DecodeState,
    GeneratedTokens,
    continue_decoding,
    generate,
)
from paligemma_jax.generation.sampling import Temperature
from paligemma_jax.generation.stop_strings import StopStrings, TextSoFar
from paligemma_jax.generation.streaming import stream, stream_rows
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.answering import rows_of
from tests.generation.speaking import EOS, babbler, questions, tokenizer

WARM = Temperature(temperature=2.0)
LENGTH = 20
ROWS = 4
AS_ASKED: dict[str, Any] = dict(max_new_tokens=LENGTH, sampler=WARM, seed=3)


@pytest.fixture(scope="module", name="answers")
def _answers() -> list[GeneratedTokens]:
    return generate(babbler(), questions(ROWS), **AS_ASKED)


def text_of(answer: GeneratedTokens) -> str:
    return tokenizer().decode(answer.tokens)[: answer.text_length]


def collect(**settings: Any) -> list[list[str]]:
    """Pieces by row, of the four questions."""
    pieces: list[list[str]] = [[] for _ in range(ROWS)]
    for row, piece in stream_rows(
        babbler(), tokenizer(), questions(ROWS), **{**AS_ASKED, **settings}
    ):
        assert piece
        pieces[row].append(piece)
    return pieces


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_joined_pieces_are_the_text(answers: list[GeneratedTokens], chunk: int):
    pieces = collect(chunk=chunk)
    assert ["".join(row) for row in pieces] == [text_of(answer) for answer in answers]
    for row in pieces:
        assert 1 < len(row) <= 1 + -(-(LENGTH - 1) // chunk)


@pytest.mark.parametrize("strings", [["a", "e"], ["<loc"], ["or", "ore", "q", "s <"]])
def test_with_stop_strings(strings: list[str]):
    stop = StopStrings(tokenizer(), strings)
    answers = generate(babbler(), questions(ROWS), **AS_ASKED, stop=stop)
    pieces = collect(chunk=2, stop=stop)
    assert ["".join(row) for row in pieces] == [text_of(answer) for answer in answers]
    assert any(answer.stop for answer in answers)


def test_answers_that_end():
    """Each at another step; least tokens and constraints are those of `generate`."""
    texts = [["yes"], ["red circle and blue square"], ["中 é"], ["red", "blue"]]
    constraint = [allowed_answers(tokenizer(), row) for row in texts]
    pieces = collect(chunk=1, constraint=constraint)
    joined = ["".join(row) for row in pieces]
    assert joined[:3] == [row[0] for row in texts[:3]] and joined[3] in texts[3]
    kept = generate(babbler(), questions(ROWS), **AS_ASKED, min_new_tokens=LENGTH)
    assert ["".join(row) for row in collect(min_new_tokens=LENGTH)] == [text_of(a) for a in kept]


def test_one_prompt(answers: list[GeneratedTokens]):
    one = rows_of(questions(ROWS), [0])
    pieces = list(stream(babbler(), tokenizer(), one, **AS_ASKED))
    assert "".join(pieces) == text_of(answers[0]) and all(isinstance(p, str) for p in pieces)
    some = dataclasses.replace(questions(ROWS), row_mask=np.arange(ROWS) == 2)
    only = generate(babbler(), some, **AS_ASKED)
    assert "".join(stream(babbler(), tokenizer(), some, **AS_ASKED)) == text_of(only[0])


def test_rows_are_numbered_without_those_that_fill(answers: list[GeneratedTokens]):
    mask = np.array([False, True, False, True])
    batch = dataclasses.replace(questions(ROWS), row_mask=mask)
    expected = [text_of(answer) for answer in generate(babbler(), batch, **AS_ASKED)]
    texts = ["", ""]
    for row, piece in stream_rows(babbler(), tokenizer(), batch, **AS_ASKED):
        texts[row] += piece
    assert texts == expected


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch):
    """Whoever leaves the loop finds the device idle, and no further step is started."""
    states: list[DecodeState] = []

    def watched(model: PaliGemma, state: DecodeState, steps: int) -> DecodeState:
        states.append(continue_decoding(model, state, steps))
        return states[-1]

    monkeypatch.setattr(streaming, "continue_decoding", watched)
    pieces = stream(babbler(), tokenizer(), questions(1), **AS_ASKED, chunk=2)
    assert not states
    next(pieces)
    next(pieces)
    running = len(states)
    pieces.close()
    assert len(states) == running <= 3
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(states[-1].progress))
    assert next(pieces, None) is None


def test_more_than_one_prompt():
    with pytest.raises(ConfigError, match="A batch of 2 prompts has no single answer"):
        stream(babbler(), tokenizer(), questions(2))
    with pytest.raises(ConfigError, match="chunk is 0"):
        stream(babbler(), tokenizer(), questions(1), chunk=0)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        stream(babbler(), tokenizer(), questions(1), max_new_tokens=0)


@functools.cache
def byte_ids() -> list[int]:
    pieces = range(tokenizer().vocab_size)
    return [i for i in pieces if tokenizer().piece(i).startswith("<0x")]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_character_is_ever_broken(data: st.DataObject):
    """Any tokens, among them bytes in any order: pieces join to the text and are never changed."""
    anything = st.integers(0, tokenizer().vocab_size - 1)
    spelled = st.text("é中😀\ufffda ", max_size=4).map(tokenizer().encode)
    part = st.one_of(
        st.lists(anything, max_size=3),
        st.lists(st.sampled_from(byte_ids()), max_size=4),
        spelled,
    )
    tokens = [t for some in data.draw(st.lists(part, max_size=5)) for t in some if t != EOS]
    text, given_so_far = TextSoFar(tokenizer()), ""
    for n in range(1, len(tokens) + 1):
        given_so_far += text.grow(tokens[:n])
        assert not given_so_far.endswith("\ufffd")
    given_so_far += text.grow(tokens, ended=True)
    assert given_so_far == tokenizer().decode(tokens)


@settings(max_examples=100, deadline=None)
@given(
    written=st.text("ab é中", min_size=1, max_size=12),
    strings=st.lists(st.text("ab é中", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_beginnings_of_stop_strings_are_held_back(written: str, strings: list[str]):
    tokens = tokenizer().encode(written)
    stop = StopStrings(tokenizer(), strings)
    text = TextSoFar(tokenizer(), stop)
    pieces = [text.grow(tokens[:n]) for n in range(1, len(tokens) + 1)]
    pieces.append(text.grow(tokens, ended=True))
    found = stop.find(tokens)
    whole = tokenizer().decode(tokens)
    assert "".join(pieces) == (whole if found is None else whole[: found.characters])


def test_characters_come_as_soon_as_they_are_complete():
    tokens = tokenizer().encode("a中b")
    text = TextSoFar(tokenizer())
    pieces = [text.grow(tokens[:n]) for n in range(1, len(tokens) + 1)]
    assert pieces == ["a", "", "", "中", "b"]
