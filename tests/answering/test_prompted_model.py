"""Every way to have a prompt answered, on the demo model, as a user calls it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg

DRAWING = Path(__file__).parents[2] / "notebooks" / "drawing.png"
CAPTION, LIMIT = "caption en", 16
WILD = pg.Chain(
    (pg.Temperature(temperature=3.0), pg.TopK(k=50), pg.Nucleus(p=0.99), pg.MinP(p=1e-4))
)


@pytest.fixture(scope="module")
def pali() -> pg.Pipeline:
    return pg.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return pg.load_image(DRAWING)


@pytest.fixture(scope="module")
def asked(picture: Image.Image) -> tuple[list[Any], list[str]]:
    """One picture, two pictures, none, and another one: three batches."""
    turned = picture.rotate(180)
    questions = [CAPTION, "answer en how many circles are there?", "ocr", "caption de"]
    return [picture, [picture, turned], None, turned], questions


@pytest.fixture(scope="module")
def greedy(pali: pg.Pipeline, asked: tuple[list[Any], list[str]]) -> list[pg.Generation]:
    return pali.generate(*asked, max_new_tokens=LIMIT)


def test_logprob_is_that_of_the_whole_answer(greedy: list[pg.Generation]):
    for row in greedy:
        assert row.logprob == math.fsum(row.logprobs) < 0


def test_an_answer_stops_before_a_text(pali, asked, greedy):
    rows = pali.generate(*asked, max_new_tokens=LIMIT, stop=["circle", " rot"])
    assert rows[0].stop == "circle" and rows[0].text == greedy[0].text.partition("circle")[0]
    assert rows[3].stop == " rot" and rows[3].text == greedy[3].text.partition(" rot")[0]
    assert rows[0].tokens == greedy[0].tokens[: len(rows[0].tokens)]
    assert rows[1] == greedy[1] and rows[1].stop is None
    alone = pali.generate([asked[0][0]], [CAPTION], max_new_tokens=LIMIT, stop="circle")
    assert (alone[0].tokens, alone[0].text) == (rows[0].tokens, rows[0].text)


def test_an_answer_of_at_least_so_many_tokens(pali, asked, greedy):
    assert len(greedy[1].tokens) < 6
    row = pali.generate(*asked, max_new_tokens=LIMIT, min_new_tokens=6)[1]
    assert len(row.tokens) >= 6 and pali.processor.tokenizer.eos_id not in row.tokens[:6]


def test_going_on_from_a_beginning(pali, asked, greedy):
    beginnings = ["a red circle,", "", "", "ein"]
    rows = pali.generate(*asked, max_new_tokens=LIMIT, beginnings=beginnings)
    assert (beginnings[0] + rows[0].text).startswith(greedy[0].text)
    assert (beginnings[3] + rows[3].text).startswith(greedy[3].text)
    assert [row.tokens for row in rows[1:3]] == [row.tokens for row in greedy[1:3]]


def test_answers_alone_are_those_in_any_batch(pali, asked):
    """Drawn, begun and stopped: prompt i draws from seed + i, wherever it is."""
    options: dict[str, Any] = dict(max_new_tokens=LIMIT, sampler=WILD, stop=["circle", "xx"])
    beginnings = ["a", "", "b", "ein"]
    together = pali.generate(*asked, seed=5, beginnings=beginnings, **options)
    assert len({row.tokens for row in together}) == 4
    small = pali.generate(*asked, seed=5, beginnings=beginnings, batch_size=1, **options)
    assert [row.tokens for row in small] == [row.tokens for row in together]
    back = pali.generate(
        asked[0][::-1], asked[1][::-1], seed=[8, 7, 6, 5], beginnings=beginnings[::-1], **options
    )
    assert [row.tokens for row in back] == [row.tokens for row in together[::-1]]
    assert [row.text for row in back] == [row.text for row in together[::-1]]


def test_prompts_without_pictures(pali):
    prompts = ["caption en", "ocr", "answer en how many circles are there?"]
    rows = pali.generate(None, prompts, max_new_tokens=LIMIT)
    alone = [pali.generate([None], [prompt], max_new_tokens=LIMIT)[0] for prompt in prompts]
    assert [row.tokens for row in rows] == [row.tokens for row in alone]
    assert rows[0].text == "".join(pali.stream(None, prompts[0], max_new_tokens=LIMIT))


def test_best_of_several(pali, asked):
    options: dict[str, Any] = dict(max_new_tokens=LIMIT, sampler=WILD, seed=3)
    rows = pali.best_of(*asked, samples=3, **options)
    for row, first in zip(rows, pali.generate(*asked, **options), strict=True):
        assert len(row) == 3 and first.tokens in [answer.tokens for answer in row]
        assert [a.logprob for a in row] == sorted((a.logprob for a in row), reverse=True)
    small = pali.best_of(*asked, samples=3, batch_size=2, **options)
    assert [[a.tokens for a in row] for row in small] == [[a.tokens for a in row] for row in rows]
    mean = pali.best_of(*asked, samples=3, alpha=1.0, **options)
    for row in mean:
        means = [a.logprob / len(a.tokens) for a in row]
        assert means == sorted(means, reverse=True)


def test_beam_search(pali, asked, greedy):
    rows = pali.beam_search(*asked, beams=3, answers=2, max_new_tokens=LIMIT)
    eos = pali.processor.tokenizer.eos_id
    assert all(len(row) == 2 and row[0].tokens[-1] == eos for row in rows)
    assert str(rows[1][0]) == greedy[1].text and rows[1][0].logprob > rows[1][1].logprob
    assert rows[1][0].score == rows[1][0].logprob == pytest.approx(greedy[1].logprob, abs=1e-5)
    small = pali.beam_search(*asked, beams=3, answers=2, max_new_tokens=LIMIT, batch_size=3)
    assert [[a.tokens for a in row] for row in small] == [[a.tokens for a in row] for row in rows]
    one = pali.beam_search(*asked, beams=1, max_new_tokens=LIMIT, ending=pg.EndWhenRanked())
    assert [row[0].tokens for row in one] == [row.tokens for row in greedy]


def test_beams_go_on_from_a_beginning(pali, asked):
    images, prompts = [asked[0][0]], ["answer en where is the red circle?"]
    begun: dict[str, Any] = dict(max_new_tokens=LIMIT, beginnings=["at the"])
    row = pali.beam_search(images, prompts, beams=2, **begun)[0]
    assert row[0].tokens == pali.generate(images, prompts, **begun)[0].tokens


@pytest.mark.parametrize(
    "options", [{}, {"sampler": WILD, "seed": 4}, {"stop": "circle"}, {"beginning": "a red"}]
)
def test_a_stream_is_the_answer_in_pieces(pali, picture, options: dict[str, Any]):
    pieces = list(pali.stream(picture, CAPTION, max_new_tokens=LIMIT, chunk=2, **options))
    if "beginning" in options:
        options = {"beginnings": [options["beginning"]]}
    whole = pali.generate([picture], [CAPTION], max_new_tokens=LIMIT, **options)[0]
    assert "".join(pieces) == whole.text and all(pieces)
    assert len(pieces) > 2 or "stop" in options


def test_a_stream_may_be_left_and_is_checked_at_the_call(pali, picture):
    pieces = pali.stream(pali.encode(picture), CAPTION)
    assert next(pieces)
    pieces.close()
    assert list(pieces) == []
    with pytest.raises(pg.ConfigError, match="chunk is 0"):
        pali.stream(picture, CAPTION, chunk=0)
    with pytest.raises(pg.InvalidImageError):
        pali.stream("nowhere.png", CAPTION)


def test_lookup_answers_the_same(pali, asked, greedy):
    rows = pali.generate_by_lookup(*asked, max_new_tokens=LIMIT)
    assert [row.tokens for row in rows] == [row.tokens for row in greedy]
    assert [row.text for row in rows] == [row.text for row in greedy]
    np.testing.assert_allclose(rows[0].logprob, greedy[0].logprob, atol=1e-4)
    begun: dict[str, Any] = dict(max_new_tokens=LIMIT, beginnings=["a red circle,", "", "", "ein"])
    tokens = [row.tokens for row in pali.generate_by_lookup(*asked, **begun)]
    assert tokens == [row.tokens for row in pali.generate(*asked, **begun)]


def test_lookup_of_objects_takes_fewer_passes(pali, picture):
    """As its documentation shows it, for one picture and for two."""
    tokenizer = pali.processor.tokenizer
    prompts = ["detect circle ; square"] * 2
    pattern = [pg.object_reference(tokenizer, "circle ; square"), []]
    rows = pali.generate_by_lookup(
        [picture] * 2,
        prompts,
        kinds=pg.object_kinds(tokenizer),
        references=pattern,
        constraint=pg.detection_grammar(tokenizer, ["circle", "square"]),
        batch_size=1,
    )
    assert rows[0].tokens == rows[1].tokens and len(pg.parse_answer(rows[0].text).objects) > 1
    assert rows[0].tokens_a_pass > 1.2 and rows[0].passes < rows[1].passes < len(rows[0].tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": [1, 2]}, "A list of 2 as seed does not go with 1 prompts"),
        ({"beginnings": ["a", "b"]}, "A list of 2 as beginnings"),
        ({"beginnings": "a"}, "One str as beginnings"),
        ({"constraint": []}, "A list of 0 as constraint"),
        ({"stop": ""}, "stop strings"),
        ({"stop": []}, "stop strings"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"min_new_tokens": 200}, "min_new_tokens is 200"),
    ],
)
def test_what_does_not_fit(pali, picture, options: dict[str, Any], words: str):
    with pytest.raises(pg.PaliGemmaError, match=words):
        pali.generate([picture], [CAPTION], **options)


def test_what_does_not_fit_several_answers(pali, picture):
    with pytest.raises(pg.ConfigError, match="2 samples by Greedy leave no choice"):
        pali.best_of([picture], [CAPTION], samples=2, sampler=pg.Greedy())
    with pytest.raises(pg.ConfigError, match="0 samples"):
        pali.best_of([picture], [CAPTION], samples=0)
    with pytest.raises(pg.ConfigError, match="beams is 0"):
        pali.beam_search([picture], [CAPTION], beams=0)
    with pytest.raises(pg.InvalidPromptError, match="no list of questions"):
        pali.beam_search(picture, CAPTION)
    with pytest.raises(pg.InvalidPromptError, match="A list of 2 as references"):
        pali.generate_by_lookup([picture], [CAPTION], references=[[], []])
