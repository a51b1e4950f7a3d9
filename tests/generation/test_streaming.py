"""Stop strings, and streams: the text of `generate`, in whole characters, while it is made."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import generate as module
from paligemma_jax.generation import streaming
from paligemma_jax.generation.constraints import allowed_answers
from paligemma_jax.generation.decode import (
    DecodeState,
    continue_decoding,
    decode_steps,
    start_progress,
)
from paligemma_jax.generation.generate import STOP_CHUNK, best_of, generate
from paligemma_jax.generation.results import Generation, GenerationEvent
from paligemma_jax.generation.stop_strings import Stop, StopStrings, TextStream
from paligemma_jax.generation.streaming import stream
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.decoding import EOS, babbler, programs, questions, tokenizer

LENGTH, COUNT = 20, 4
HOW: dict[str, Any] = dict(max_new_tokens=LENGTH, temperature=2.0, seed=0)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def ask(chosen: list[int] | None = None, **settings: Any) -> list[Generation]:
    batch = questions(COUNT)
    if chosen is not None:
        batch = dataclasses.replace(batch, row_mask=np.isin(np.arange(COUNT), chosen))
    how: dict[str, Any] = HOW | {"eos_token_id": ()} | settings
    return generate(babbler(), batch, tokenizer(), **how)


def collect(**settings: Any) -> list[list[GenerationEvent]]:
    """Events of each of the four questions."""
    events: list[list[GenerationEvent]] = [[] for _ in range(COUNT)]
    for event in stream(babbler(), questions(COUNT), tokenizer(), **HOW | settings):
        assert event.text or event.generation is not None
        events[event.index].append(event)
    return events


def check_events(events: list[list[GenerationEvent]], expected: list[Generation]) -> None:
    """Their texts, tokens and log-probabilities, joined, are those of `generate`."""
    for own, whole in zip(events, expected, strict=True):
        assert "".join(map(str, own)) == whole.text
        assert tuple(token for event in own for token in event.tokens) == whole.tokens
        assert own[-1].generation == whole and own[-1].finish_reason == whole.finish_reason
        assert all(event.finish_reason is None for event in own[:-1])
        logprobs = [p for event in own for p in event.logprobs]
        np.testing.assert_allclose(logprobs, whole.logprobs, atol=1e-5)


def test_a_string_over_several_tokens():
    tokens = ids("a cat on the mat")
    assert len(tokens) > 6
    found = StopStrings(tokenizer(), ["t on t"]).find(tokens)
    assert found is not None and found.characters == 4
    decode = tokenizer().decode
    assert "t on t" in decode(tokens[: found.tokens])
    assert "t on t" not in decode(tokens[: found.tokens - 1])
    assert StopStrings(tokenizer(), ["b"]).find([*ids("a"), EOS, *ids("b")]) is None


def test_half_characters_are_waited_for():
    tokens = ids("é 中 x")
    pieces = [tokenizer().piece(token) for token in tokens]
    assert "<0xB8>" in pieces  # the demo's vocabulary spells it in bytes
    stop = StopStrings(tokenizer(), ["\ufffd", "中"])
    found = [stop.find(tokens[:n]) for n in range(len(tokens) + 1)]
    complete = pieces.index("<0xAD>") + 1
    assert found[:complete] == [None] * complete
    assert found[complete:] == [Stop("中", 2, complete)] * (len(tokens) + 1 - complete)


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


@pytest.fixture(scope="module")
def free() -> list[Generation]:
    return ask()


@pytest.fixture(scope="module")
def stop(free: list[Generation]) -> list[str]:
    """Sequence 0 stops over two tokens in its second chunk, 1 at its start, others not."""
    text = tokenizer().decode
    one, two = text(free[0].tokens[9:10]), text(free[0].tokens[10:11])
    strings = [one[-1:] + two[:1], text(free[1].tokens[:2])[:2]]
    assert all(StopStrings(tokenizer(), strings).find(row.tokens) is None for row in free[2:])
    return strings


def test_sequences_stop_on_their_own(free: list[Generation], stop: list[str]):
    for row, whole in zip(ask(stop=stop), free, strict=True):
        found = StopStrings(tokenizer(), stop).find(whole.tokens)
        if found is None:
            assert row == whole and row.stop is None and row.finish_reason == "length"
            continue
        assert row.tokens == whole.tokens[: found.tokens]
        assert (row.stop, row.finish_reason) == (found.string, "stop")
        assert row.text == whole.text[: found.characters]
        np.testing.assert_allclose(row.logprobs, whole.logprobs[: found.tokens], atol=1e-5)
    each = ask(stop=[stop, [], ["\n\n\n"], []])
    assert [row.finish_reason for row in each] == ["stop", "length", "length", "length"]


def test_nothing_is_decoded_when_all_have_stopped(stop: list[str], monkeypatch):
    """How often is looked changes nothing else."""
    steps, expected = [], ask(stop=stop)

    def count(model: PaliGemma, state: DecodeState, n: int) -> DecodeState:
        after = continue_decoding(model, state, n)
        steps.append(int(after.progress.step))
        return after

    monkeypatch.setattr(module, "continue_decoding", count)
    ask([1], stop=stop, seed=1)
    assert steps == [STOP_CHUNK]
    steps.clear()
    ask([0, 1], stop=stop)
    assert steps == [STOP_CHUNK, 2 * STOP_CHUNK]
    for chunk in (1, 64):
        monkeypatch.setattr(module, "STOP_CHUNK", chunk)
        assert [row.tokens for row in ask(stop=stop)] == [row.tokens for row in expected]


def test_what_ended_a_sample_counts_in_its_rank():
    batch = dataclasses.replace(questions(2), images=None)
    how: dict[str, Any] = dict(n=4, max_new_tokens=12, eos_token_id=())
    text = best_of(babbler(), batch, tokenizer(), **how)[0][0].text
    found = best_of(babbler(), batch, tokenizer(), stop=text[0], **how)
    assert any(g.stop and not g.text and len(g.tokens) == 1 for g in found[0])
    for group in found:
        assert [g.logprob for g in group] == sorted((g.logprob for g in group), reverse=True)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_joined_events_are_the_generations(chunk: int):
    expected = ask(eos_token_id=EOS)
    before = programs(start_progress, decode_steps)
    events = collect(chunk=chunk)
    assert programs(start_progress, decode_steps) == before  # those of `generate`
    check_events(events, expected)
    for own in events:
        assert 1 < len(own) <= 2 + -(-(LENGTH - 1) // chunk)


def test_another_length_compiles_nothing():
    def length(limit: int) -> int:
        how: dict[str, Any] = HOW | {"max_new_tokens": limit}
        return sum(len(e.tokens) for e in stream(babbler(), questions(1), tokenizer(), **how))

    assert length(20) > 5
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    assert length(31) > 5
    assert not [name for name in events if name.endswith("backend_compile_duration")]


@pytest.mark.parametrize("strings", [["a", "e"], ["<loc"], ["or", "ore", "q", "s <"]])
def test_with_stop_strings(strings: list[str]):
    expected = ask(stop=strings, eos_token_id=EOS, seed=3)
    check_events(collect(chunk=2, stop=strings, seed=3), expected)
    assert any(row.stop for row in expected)


def test_sequences_that_end_at_different_steps():
    texts = [["yes"], ["red circle and blue square"], ["中 é"], ["red", "blue"]]
    constraint = [allowed_answers(tokenizer(), row) for row in texts]
    events = collect(chunk=1, constraint=constraint)
    joined = ["".join(map(str, own)) for own in events]
    assert joined[:3] == [row[0] for row in texts[:3]] and joined[3] in texts[3]
    assert {own[-1].finish_reason for own in events} == {"eos"}
    limits = dict(max_new_tokens=[3, 9, 1, LENGTH], min_new_tokens=[0, 9, 0, 5])
    check_events(collect(**limits), ask(eos_token_id=EOS, **limits))


def test_events_are_numbered_without_fillers():
    batch = dataclasses.replace(questions(COUNT), row_mask=np.array([False, True, False, True]))
    texts = ["", ""]
    for event in stream(babbler(), batch, tokenizer(), **HOW):
        texts[event.index] += event.text
    assert texts == [row.text for row in generate(babbler(), batch, tokenizer(), **HOW)]


def test_nothing_is_left_running(monkeypatch):
    """Whoever leaves the loop finds the device idle, and no further step is started."""
    states: list[DecodeState] = []

    def watched(model: PaliGemma, state: DecodeState, steps: int) -> DecodeState:
        states.append(continue_decoding(model, state, steps))
        return states[-1]

    monkeypatch.setattr(streaming, "continue_decoding", watched)
    events = stream(babbler(), questions(1), tokenizer(), chunk=2, **HOW)
    assert not states
    next(events)
    next(events)
    running = len(states)
    events.close()
    assert len(states) == running <= 3
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(states[-1].progress))
    assert next(events, None) is None
    with pytest.raises(ConfigError, match="chunk: expected"):
        stream(babbler(), questions(1), tokenizer(), chunk=0)
    with pytest.raises(ConfigError, match="max_new_tokens: expected"):
        stream(babbler(), questions(1), tokenizer(), max_new_tokens=0)


@functools.cache
def byte_ids() -> list[int]:
    pieces = range(tokenizer().vocab_size)
    return [i for i in pieces if tokenizer().piece(i).startswith("<0x")]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_character_is_ever_broken(data: st.DataObject):
    """Any tokens, among them bytes in any order: pieces join to the text and are never changed."""
    anything = st.integers(0, tokenizer().vocab_size - 1)
    spelled = st.text("é中😀\ufffda ", max_size=4).map(ids)
    part = st.one_of(
        st.lists(anything, max_size=3),
        st.lists(st.sampled_from(byte_ids()), max_size=4),
        spelled,
    )
    tokens = [t for some in data.draw(st.lists(part, max_size=5)) for t in some if t != EOS]
    text, so_far = TextStream(tokenizer()), ""
    for n in range(1, len(tokens) + 1):
        so_far += text.grow(tokens[:n])
        assert not so_far.endswith("\ufffd")
    assert so_far + text.finish(tokenizer().decode(tokens)) == tokenizer().decode(tokens)


@settings(max_examples=100, deadline=None)
@given(
    written=st.text("ab é中", min_size=1, max_size=12),
    strings=st.lists(st.text("ab é中", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_beginnings_of_stop_strings_are_held_back(written: str, strings: list[str]):
    tokens = ids(written)
    stop = StopStrings(tokenizer(), strings)
    found, whole = stop.find(tokens), tokenizer().decode(tokens)
    text = TextStream(tokenizer(), stop)
    end = len(tokens) if found is None else found.tokens - 1
    joined = "".join(text.grow(tokens[:n]) for n in range(1, end + 1))
    expected = whole if found is None else whole[: found.characters]
    assert expected.startswith(joined) and joined + text.finish(expected) == expected


def test_characters_come_as_soon_as_they_are_complete():
    tokens = ids("a中b")
    text = TextStream(tokenizer())
    assert [text.grow(tokens[:n]) for n in range(1, len(tokens) + 1)] == ["a", "", "", "中", "b"]
