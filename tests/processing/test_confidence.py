"""Which tokens an object was read from, and the scores made of their probabilities."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.processing import box_scores as confidence
from paligemma_jax.processing.box_scores import NEAR_RADII, ObjectEvidence, ProductOf, weigh_tokens
from paligemma_jax.processing.location_tokens import parse_answer, parse_tokens
from paligemma_jax.processing.tokenizer import Tokenizer
from tests.processing.conftest import GOLDEN
from tests.processing.test_parsing import ANSWERS

BINS = (0, 0, 100, 100)
L = "<loc0001><loc0002><loc0003><loc0004>"
M = "".join(f"<seg{code:03d}>" for code in range(16))
TINY = Tokenizer.from_file(GOLDEN / "tiny_paligemma.model")


def pieces(tokenizer: Tokenizer, tokens: list[int], places: tuple[int, ...]) -> list[str]:
    return [tokenizer.piece(tokens[place]) for place in places]


def test_places_of_every_part(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"look {L} cat ; {L}{M} 日 (a);{L}")
    parsed = parse_tokens(tokens, tokenizer)
    assert [box.label for box in parsed.answer.objects] == ["cat", "日 (a)", ""]
    first, second, third = parsed.places
    for places in parsed.places:
        assert pieces(tokenizer, tokens, places.locations) == [f"<loc{i:04d}>" for i in range(1, 5)]
    assert pieces(tokenizer, tokens, first.label) == ["▁c", "at"]
    assert first.separators == () and first.codes == ()
    assert pieces(tokenizer, tokens, second.separators) == ["▁", ";", "▁"]
    assert pieces(tokenizer, tokens, second.codes) == [f"<seg{i:03d}>" for i in range(16)]
    assert tokenizer.decode([tokens[i] for i in second.label]).strip() == "日 (a)"
    assert third.label == () and pieces(tokenizer, tokens, third.separators) == [";"]


def test_words_between_objects_are_no_separators(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"{L} cat ; and {L} cat")
    separators = parse_tokens(tokens, tokenizer).places[1].separators
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
    assert len(parsed.places) == len(parsed.answer.objects)


def test_bytes_of_a_cut_character(tokenizer: Tokenizer):
    tokens = tokenizer.encode(f"{L} 日")[:-1]
    (places,) = parse_tokens(tokens, tokenizer).places
    assert len(places.label) == 2


def test_spelled_out_marks_are_words(tokenizer: Tokenizer):
    # No piece but the location itself encodes it; a model can still write its letters.
    letters = [token for letter in "<loc0001>" for token in tokenizer.encode(letter)]
    tokens = [*letters * 4, *tokenizer.encode(" cat")]
    parsed = parse_tokens(tokens, tokenizer)
    assert parsed.answer.text == "<loc0001>" * 4 + " cat"
    assert not parsed.answer.objects and parsed.answer.unused[0].text == parsed.answer.text


def test_unknown_token(tokenizer: Tokenizer):
    with pytest.raises(InvalidPromptError, match="unknown"):
        parse_tokens([tokenizer.vocab_size], tokenizer)


def test_evidence_of_each_object(tokenizer: Tokenizer):
    tokens = [*tokenizer.encode(f"{L} cat ; {L} cat"), tokenizer.eos_id]
    logprobs = [-0.01 * i for i in range(len(tokens))]
    masses = [(-0.001 * i, *[-0.002 * i] * len(NEAR_RADII)) for i in range(len(tokens))]
    first, second = weigh_tokens(tokens, logprobs, tokenizer, masses).evidence
    assert first.locations == (0.0, -0.01, -0.02, -0.03)
    assert first.label == (-0.04, -0.05) and not first.separators
    assert second.separators == (-0.06, -0.07, -0.08)
    assert second.location_mass == tuple(masses[i][0] for i in range(9, 13))
    assert second.near_mass == tuple(masses[i][1:] for i in range(9, 13))
    assert first.bins == second.bins == (1, 2, 3, 4)
    unseen = weigh_tokens(tokens, logprobs, tokenizer).evidence[0]
    assert unseen.location_mass is None and unseen.near_mass is None


def test_evidence_of_another_answer(tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="4 tokens, 3 log-probabilities and 0 rows"):
        weigh_tokens(tokenizer.encode(L), [0.0] * 3, tokenizer)
    with pytest.raises(ConfigError, match="and 5 rows"):
        weigh_tokens(tokenizer.encode(L), [0.0] * 4, tokenizer, [(0.0, 0.0)] * 5)
    with pytest.raises(ConfigError, match="2 numbers a token"):
        weigh_tokens(tokenizer.encode(L), [0.0] * 4, tokenizer, [(0.0, 0.0)] * 4)


NATS = {name: math.log(p) for name, p in {"half": 0.5, "tenth": 0.1, "most": 0.8}.items()}
FINE = (NATS["most"],) * 3 + (0.0,) * 4  # radii 2, 4, 8; all of it within 16
EVIDENCE = ObjectEvidence(
    bins=(100, 100, 164, 228),
    locations=(NATS["half"], NATS["half"], NATS["half"], NATS["tenth"]),
    codes=(NATS["most"],) * 16,
    label=(NATS["half"], NATS["tenth"]),
    separators=(NATS["most"], 0.0),
    location_mass=(NATS["half"], 0.0, 0.0, 0.0),
    near_mass=(FINE, FINE, FINE, (NATS["half"],) * 3 + (0.0,) * 4),
)


@pytest.mark.parametrize(
    "score, wanted",
    [
        (confidence.location_product, 0.0125),
        (confidence.location_geometric, 0.0125**0.25),
        (confidence.location_minimum, 0.1),
        (confidence.near_product, 0.256),
        (confidence.near_geometric, 0.256**0.25),
        (confidence.near_minimum, 0.5),
        # An eighth of the height is 8 bins, of the width 16.
        (confidence.good_fit, 0.8 * 1 * 0.8 * 1),
        (confidence.mean_fit, 0.64**0.25),
        (confidence.label_product, 0.05),
        (confidence.label_geometric, 0.05**0.5),
        (confidence.mask_geometric, 0.8),
        (confidence.box_start, 0.5),
        (confidence.objectness, 0.4),
        (ProductOf((confidence.objectness, confidence.near_minimum)), 0.2),
    ],
)
def test_scores(score: confidence.Score, wanted: float):
    np.testing.assert_allclose(score(EVIDENCE), wanted)
    assert confidence.WeighedAnswer(parse_answer(""), (EVIDENCE,)).scores(score) == (
        score(EVIDENCE),
    )


def test_scores_without_parts_and_of_rounded_sums():
    bare = ObjectEvidence(BINS, (1e-7,) * 4, (), (), (), (1e-7,) * 4, ((1e-7,) * 7,) * 4)
    for name in ("location_product", "near_minimum", "good_fit", "label_product", "mask_geometric"):
        assert getattr(confidence, name)(bare) == 1
    hopeless = ObjectEvidence(BINS, (-math.inf,) * 4, (), (), ())
    assert confidence.location_geometric(hopeless) == 0
    with pytest.raises(ConfigError, match="LocationStatistics"):
        confidence.near_product(hopeless)
    with pytest.raises(ConfigError, match="LocationStatistics"):
        confidence.good_fit(hopeless)


def test_good_fit_grows_evenly_between_radii_and_is_the_token_alone_for_the_thinnest_box():
    shares = [0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0]
    masses = (tuple(math.log(share) for share in shares),) * 4
    tenth = (math.log(0.1),) * 4

    def fit(side: int) -> float:
        return confidence.good_fit(
            ObjectEvidence((0, 0, side, side), tenth, (), (), (), (0.0,) * 4, masses)
        )

    np.testing.assert_allclose(fit(96), 0.5**4)  # 12 bins, between 8 and 16
    np.testing.assert_allclose(fit(0), 0.1**4)
    np.testing.assert_allclose(fit(8), 0.15**4)
