"""Stop strings: where in a text, at which token, and in the decode loop."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.generation import decode as answers
from paligemma_jax.generation import decode as loop
from paligemma_jax.generation.decode import CHUNK, GeneratedTokens, generate
from paligemma_jax.generation.sampling import Temperature
from paligemma_jax.generation.stop_strings import Stop, StopStrings
from tests.generation.answering import NO_EOS
from tests.generation.speaking import EOS, babbler, questions, tokenizer

WARM = Temperature(temperature=2.0)
LENGTH = 20


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def test_a_string_over_several_tokens():
    tokens = ids("a cat on the mat")
    assert len(tokens) > 6
    found = StopStrings(tokenizer(), ["t on t"]).find(tokens)
    assert found is not None and found.characters == 4
    decode = tokenizer().decode
    assert decode(tokens)[: found.characters] == "a ca"
    assert "t on t" in decode(tokens[: found.tokens])
    assert "t on t" not in decode(tokens[: found.tokens - 1])


def test_the_one_that_is_complete_first_counts():
    tokens = ids("abcdefgh")
    stop = StopStrings(tokenizer(), ["abcdef", "cd", "bcd", "h"])
    found = stop.find(tokens)
    assert found is not None and (found.string, found.characters) == ("bcd", 1)
    assert StopStrings(tokenizer(), ["x", "cb"]).find(tokens) is None
    assert StopStrings(tokenizer(), "cd").strings == ("cd",)


def test_half_characters_are_waited_for():
    tokens = ids("é 中 x")
    pieces = [tokenizer().piece(token) for token in tokens]
    assert "<0xB8>" in pieces  # the demo's vocabulary spells it in bytes
    stop = StopStrings(tokenizer(), ["\ufffd", "中"])
    found = [stop.find(tokens[:n]) for n in range(len(tokens) + 1)]
    complete = pieces.index("<0xAD>") + 1
    assert found[:complete] == [None] * complete
    assert found[complete:] == [Stop("中", 2, complete)] * (len(tokens) + 1 - complete)


def test_nothing_is_found_behind_eos():
    assert StopStrings(tokenizer(), ["b"]).find([*ids("a"), EOS, *ids("b")]) is None


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab é中", min_size=1, max_size=12),
    strings=st.lists(st.text("ab é中", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_a_reader_who_goes_character_by_character_finds_the_same(text: str, strings: list[str]):
    tokens = ids(text)
    text = tokenizer().decode(tokens)
    expected = None
    for end in range(len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            expected = (longest, end - len(longest))
            break
    stop = StopStrings(tokenizer(), strings)
    found = [stop.find(tokens[:n]) for n in range(len(tokens) + 1)]
    last = found[-1]
    assert (None if last is None else (last.string, last.characters)) == expected
    if last is not None:  # found with the token that completes it, and ever after
        assert found == [None] * last.tokens + [last] * (len(tokens) + 1 - last.tokens)


@pytest.mark.parametrize("strings", [[], [""], ["a", ""]])
def test_impossible_strings(strings: list[str]):
    with pytest.raises(InvalidPromptError, match="At least one, and none that is empty"):
        StopStrings(tokenizer(), strings)


def ask(
    stop: StopStrings | None, rows: list[int] | None = None, **kw: Any
) -> list[GeneratedTokens]:
    batch = questions(4)
    if rows is not None:
        mask = np.isin(np.arange(4), rows)
        batch = dataclasses.replace(batch, row_mask=mask)
    asked: dict[str, Any] = dict(max_new_tokens=LENGTH, sampler=WARM, eos_id=NO_EOS)
    return generate(babbler(), batch, stop=stop, **{**asked, **kw})


@pytest.fixture(scope="module")
def free() -> list[GeneratedTokens]:
    return ask(None)


@pytest.fixture(scope="module")
def stop(free: list[GeneratedTokens]) -> StopStrings:
    """Row 0 stops over two tokens in its second chunk, row 1 at its first token, others not."""
    text = tokenizer().decode
    one, two = text(free[0].tokens[9:10]), text(free[0].tokens[10:11])
    first = text(free[1].tokens[:2])[:2]
    made = StopStrings(tokenizer(), [one[-1:] + two[:1], first])
    assert all(made.find(row.tokens) is None for row in free[2:])
    return made


def test_rows_stop_on_their_own(free: list[GeneratedTokens], stop: StopStrings):
    rows = ask(stop)
    for row, whole in zip(rows, free, strict=True):
        found = stop.find(whole.tokens)
        if found is None:
            assert row == whole and row.stop is None and row.text_length is None
            continue
        assert row.tokens == whole.tokens[: found.tokens]
        np.testing.assert_allclose(row.logprobs, whole.logprobs[: found.tokens], atol=1e-5)
        assert (row.stop, row.text_length) == (found.string, found.characters)
    assert sum(row.stop is not None for row in rows) == 2
    assert rows[0].stop == stop.strings[0] and 1 < len(rows[0].tokens) <= 11
    assert rows[1].stop == stop.strings[1]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_how_often_is_looked_changes_nothing(
    stop: StopStrings, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    expected = ask(stop)
    monkeypatch.setattr(answers, "CHUNK", chunk)
    assert [row.tokens for row in ask(stop)] == [row.tokens for row in expected]


def test_nothing_is_decoded_when_all_have_stopped(
    stop: StopStrings, monkeypatch: pytest.MonkeyPatch
):
    """Row 1 alone stops at once: only the chunk it stops in is decoded."""
    steps = []
    whole = answers.continue_decoding

    def count(model, state: loop.DecodeState, n: int) -> loop.DecodeState:
        after = whole(model, state, n)
        steps.append(int(after.progress.step))
        return after

    monkeypatch.setattr(answers, "continue_decoding", count)
    ask(stop, rows=[1])
    assert steps == [CHUNK]
    steps.clear()
    ask(stop, rows=[0, 1])
    assert steps == [CHUNK, 2 * CHUNK]


def test_stop_strings_that_never_come_change_nothing(free: list[GeneratedTokens]):
    assert ask(StopStrings(tokenizer(), ["\n\n\n"])) == free
    eos = free[2].tokens[3]
    assert ask(StopStrings(tokenizer(), ["\n\n\n"]), eos_id=eos) == ask(None, eos_id=eos)


def test_without_pictures(stop: StopStrings):
    batch = dataclasses.replace(questions(2), images=None)
    asked: dict[str, Any] = dict(max_new_tokens=LENGTH, sampler=WARM, eos_id=NO_EOS)
    whole = generate(babbler(), batch, **asked)
    text = tokenizer().decode(whole[1].tokens)
    rows = generate(babbler(), batch, stop=StopStrings(tokenizer(), [text[-3:-1]]), **asked)
    assert rows[1].stop == text[-3:-1]
    assert len(rows[1].tokens) == LENGTH or rows[1].tokens == whole[1].tokens[: len(rows[1].tokens)]
