"""Which tokens an object was read from, and the scores made of their probabilities."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.processing.box_scores import (
    NEAR_RADII,
    ObjectLogprobs,
    box_score,
    edge_score,
    objectness,
    parse_logprobs,
)
from paligemma_jax.processing.location_tokens import parse_answer, parse_tokens
from paligemma_jax.processing.tokenizer import Tokenizer
from tests.processing.conftest import GOLDEN
from tests.processing.test_parsing import ANSWERS

L = "<loc0001><loc0002><loc0003><loc0004>"
M = "".join(f"<seg{code:03d}>" for code in range(16))
TINY = Tokenizer.from_file(GOLDEN / "tiny_paligemma.model")


def pieces(tokenizer: Tokenizer, tokens: list[int], places: tuple[int, ...]) -> list[str]:
    return [tokenizer.piece(tokens[place]) for place in places]


def test_places_of_every_part(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"look {L} cat ; {L}{M} 日 (a);{L}")
    parsed = parse_tokens(tokens, tokenizer)
    assert [box.label for box in parsed.answer.objects] == ["cat", "日 (a)", ""]
    first, second, third = parsed.tokens
    for own in parsed.tokens:
        assert pieces(tokenizer, tokens, own.locations) == [f"<loc{i:04d}>" for i in range(1, 5)]
    assert pieces(tokenizer, tokens, first.label) == ["▁c", "at"]
    assert first.separators == () and first.codes == ()
    assert pieces(tokenizer, tokens, second.separators) == ["▁", ";", "▁"]
    assert pieces(tokenizer, tokens, second.codes) == [f"<seg{i:03d}>" for i in range(16)]
    assert tokenizer.decode([tokens[i] for i in second.label]).strip() == "日 (a)"
    assert third.label == () and pieces(tokenizer, tokens, third.separators) == [";"]


def test_words_between_objects_are_no_separators(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"{L} cat ; and {L} cat")
    separators = parse_tokens(tokens, tokenizer).tokens[1].separators
    assert pieces(tokenizer, tokens, separators)[:2] == ["▁", ";"]
    assert "and" not in tokenizer.decode([tokens[place] for place in separators])


@given(ANSWERS | st.text(max_size=20))
def test_same_as_the_parser_of_text(text: str):
    tokens = TINY.encode(text)
    parsed = parse_tokens([TINY.bos_id, *tokens, TINY.eos_id, 5], TINY)
    assert parsed.answer == parse_answer(TINY.decode(tokens))
    assert [box.span for box in parsed.answer.objects] == [
        box.span for box in parse_answer(TINY.decode(tokens)).objects
    ]


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30))
def test_any_tokens_can_be_read(tokens: list[int]):
    parsed = parse_tokens(tokens, TINY)
    assert parsed.answer.text == TINY.decode(tokens)
    assert len(parsed.tokens) == len(parsed.answer.objects)


def test_bytes_of_a_cut_character(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"{L} 日")[:-1]
    (places,) = parse_tokens(tokens, tokenizer).tokens
    assert len(places.label) == 2


def test_spelled_out_marks_are_words(tokenizer: Tokenizer):
    # No piece but the location itself encodes it; a model can still write its letters.
    letters = [token for letter in "<loc0001>" for token in tokenizer.encode(letter)]
    tokens = [*letters * 4, *tokenizer.encode(" cat")]
    parsed = parse_tokens(tokens, tokenizer)
    assert parsed.answer.text == "<loc0001>" * 4 + " cat"
    assert not parsed.answer.objects and parsed.answer.unparsed[0].text == parsed.answer.text


def test_unknown_token(tokenizer: Tokenizer):
    with pytest.raises(InvalidPromptError, match="got"):
        parse_tokens([tokenizer.vocab_size], tokenizer)


def test_logprobs_of_each_object(tokenizer: Tokenizer):
    tokens = [*tokenizer.encode(f"{L} cat ; {L} cat"), tokenizer.eos_id]
    logprobs = [-0.01 * i for i in range(len(tokens))]
    masses = [(-0.001 * i, *[-0.002 * i] * len(NEAR_RADII)) for i in range(len(tokens))]
    first, second = parse_logprobs(tokens, logprobs, tokenizer, masses).objects
    assert first.locations == (0.0, -0.01, -0.02, -0.03)
    assert first.label == (-0.04, -0.05) and not first.separators
    assert second.separators == (-0.06, -0.07, -0.08)
    assert second.location_mass == tuple(masses[i][0] for i in range(9, 13))
    assert second.near_mass == tuple(masses[i][1:] for i in range(9, 13))
    assert first.bins == second.bins == (1, 2, 3, 4)
    bare = parse_logprobs(tokens, logprobs, tokenizer)
    assert bare.objects[0].location_mass is None and bare.objects[0].near_mass is None
    with pytest.raises(ConfigError, match="LocationStatistics"):
        bare.scores()


def test_logprobs_of_another_answer(tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="4 tokens, 3 log-probabilities and 0 extras"):
        parse_logprobs(tokenizer.encode(L), [0.0] * 3, tokenizer)
    with pytest.raises(ConfigError, match="and 5 extras"):
        parse_logprobs(tokenizer.encode(L), [0.0] * 4, tokenizer, [(0.0, 0.0)] * 5)
    with pytest.raises(ConfigError, match="got 2"):
        parse_logprobs(tokenizer.encode(L), [0.0] * 4, tokenizer, [(0.0, 0.0)] * 4)


NATS = {name: math.log(p) for name, p in {"half": 0.5, "tenth": 0.1, "most": 0.8}.items()}
FINE = (NATS["most"],) * 3 + (0.0,) * 4  # radii 2, 4, 8; all of it within 16
LOGPROBS = ObjectLogprobs(
    bins=(100, 100, 164, 228),
    locations=(NATS["half"], NATS["half"], NATS["half"], NATS["tenth"]),
    label=(NATS["half"], NATS["tenth"]),
    separators=(NATS["most"], 0.0),
    location_mass=(NATS["half"], 0.0, 0.0, 0.0),
    near_mass=(FINE, FINE, FINE, (NATS["half"],) * 3 + (0.0,) * 4),
)


def test_scores():
    np.testing.assert_allclose(objectness(LOGPROBS), 0.4)
    # An eighth of the height is 8 bins, of the width 16.
    np.testing.assert_allclose(edge_score(LOGPROBS), (0.8 * 1 * 0.8 * 1) ** 0.25)
    np.testing.assert_allclose(box_score(LOGPROBS), 0.4 * 0.05 * 0.64**0.25)
    sure = ObjectLogprobs(
        (0, 0, 100, 100), (1e-7,) * 4, location_mass=(1e-7,) * 4, near_mass=((1e-7,) * 7,) * 4
    )
    assert box_score(sure) == 1  # sums that are rounded above 1


def test_edges_between_radii_and_of_the_thinnest_box():
    masses = (tuple(math.log(mass) for mass in (0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0)),) * 4

    def edges(side: int) -> float:
        return edge_score(
            ObjectLogprobs((0, 0, side, side), (math.log(0.1),) * 4, near_mass=masses)
        )

    np.testing.assert_allclose(edges(96), 0.5)  # 12 bins, between 8 and 16
    np.testing.assert_allclose(edges(0), 0.1)
    np.testing.assert_allclose(edges(8), 0.15)
