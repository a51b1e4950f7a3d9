"""Every way to generate an answer, on the demo model, as a user calls it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.generation import constraints

DRAWING = Path(__file__).parents[1] / "notebooks" / "drawing.png"
CAPTION, LIMIT = "caption en", 16
WILD: dict[str, Any] = dict(temperature=3.0, top_k=50, top_p=0.99, min_p=1e-4)


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
    prefixes = ["a red circle,", "", "", "ein"]
    rows = pali.generate(*asked, max_new_tokens=LIMIT, answer_prefixes=prefixes)
    assert (prefixes[0] + rows[0].text).startswith(greedy[0].text)
    assert (prefixes[3] + rows[3].text).startswith(greedy[3].text)
    assert [row.tokens for row in rows[1:3]] == [row.tokens for row in greedy[1:3]]


def test_answers_alone_are_those_in_any_batch(pali, asked):
    """Drawn, begun and stopped: prompt i draws from seed + i, wherever it is."""
    options: dict[str, Any] = dict(max_new_tokens=LIMIT, stop=["circle", "xx"], **WILD)
    prefixes = ["a", "", "b", "ein"]
    together = pali.generate(*asked, seed=5, answer_prefixes=prefixes, **options)
    assert len({row.tokens for row in together}) == 4
    small = pali.generate(*asked, seed=5, answer_prefixes=prefixes, batch_size=1, **options)
    assert [row.tokens for row in small] == [row.tokens for row in together]
    back = pali.generate(
        asked[0][::-1],
        asked[1][::-1],
        seed=[8, 7, 6, 5],
        answer_prefixes=prefixes[::-1],
        **options,
    )
    assert [row.tokens for row in back] == [row.tokens for row in together[::-1]]
    assert [row.text for row in back] == [row.text for row in together[::-1]]


def test_prompts_without_pictures(pali):
    prompts = ["caption en", "ocr", "answer en how many circles are there?"]
    rows = pali.generate(None, prompts, max_new_tokens=LIMIT)
    alone = [pali.generate([None], [prompt], max_new_tokens=LIMIT)[0] for prompt in prompts]
    assert [row.tokens for row in rows] == [row.tokens for row in alone]
    assert rows[0].text == "".join(map(str, pali.stream(None, prompts[0], max_new_tokens=LIMIT)))


def test_best_of_several(pali, asked):
    options: dict[str, Any] = dict(max_new_tokens=LIMIT, seed=3, **WILD)
    rows = pali.best_of(*asked, n=3, **options)
    for row, first in zip(rows, pali.generate(*asked, **options), strict=True):
        assert len(row) == 3 and first.tokens in [answer.tokens for answer in row]
        assert [a.logprob for a in row] == sorted((a.logprob for a in row), reverse=True)
    small = pali.best_of(*asked, n=3, batch_size=2, **options)
    assert [[a.tokens for a in row] for row in small] == [[a.tokens for a in row] for row in rows]
    mean = pali.best_of(*asked, n=3, length_penalty=1.0, **options)
    for row in mean:
        means = [a.logprob / len(a.tokens) for a in row]
        assert means == sorted(means, reverse=True)


def test_beam_search(pali, asked, greedy):
    rows = pali.beam_search(*asked, num_beams=3, num_return_sequences=2, max_new_tokens=LIMIT)
    eos = pali.processor.tokenizer.eos_id
    assert all(len(row) == 2 and row[0].tokens[-1] == eos for row in rows)
    assert str(rows[1][0]) == greedy[1].text and rows[1][0].logprob > rows[1][1].logprob
    assert rows[1][0].score == pytest.approx(greedy[1].logprob, abs=1e-5)
    small = pali.beam_search(
        *asked, num_beams=3, num_return_sequences=2, max_new_tokens=LIMIT, batch_size=3
    )
    assert [[a.tokens for a in row] for row in small] == [[a.tokens for a in row] for row in rows]
    one = pali.beam_search(*asked, num_beams=1, max_new_tokens=LIMIT, early_stopping=False)
    assert [row[0].tokens for row in one] == [row.tokens for row in greedy]


def test_beams_go_on_from_a_beginning(pali, asked):
    images, prompts = [asked[0][0]], ["answer en where is the red circle?"]
    begun: dict[str, Any] = dict(max_new_tokens=LIMIT, answer_prefixes=["at the"])
    row = pali.beam_search(images, prompts, num_beams=2, **begun)[0]
    assert row[0].tokens == pali.generate(images, prompts, **begun)[0].tokens


@pytest.mark.parametrize(
    "options", [{}, {"seed": 4, **WILD}, {"stop": "circle"}, {"answer_prefix": "a red"}]
)
def test_a_stream_is_the_answer_in_pieces(pali, picture, options: dict[str, Any]):
    events = list(pali.stream(picture, CAPTION, max_new_tokens=LIMIT, chunk=2, **options))
    if "answer_prefix" in options:
        options = {"answer_prefixes": [options["answer_prefix"]]}
    whole = pali.generate([picture], [CAPTION], max_new_tokens=LIMIT, **options)[0]
    assert "".join(map(str, events)) == whole.text
    assert events[-1].finish_reason == whole.finish_reason and events[-1].generation is not None
    assert len(events) > 2 or "stop" in options


def test_a_stream_may_be_left_and_is_checked_at_the_call(pali, picture):
    pieces = pali.stream(pali.encode(picture), CAPTION)
    assert next(pieces)
    pieces.close()
    assert list(pieces) == []
    with pytest.raises(pg.ConfigError, match="chunk: expected"):
        pali.stream(picture, CAPTION, chunk=0)
    with pytest.raises(pg.InvalidImageError):
        pali.stream("nowhere.png", CAPTION)


def test_lookup_answers_the_same(pali, asked, greedy):
    rows = pali.prompt_lookup_generate(*asked, max_new_tokens=LIMIT)
    assert [row.tokens for row in rows] == [row.tokens for row in greedy]
    assert [row.text for row in rows] == [row.text for row in greedy]
    np.testing.assert_allclose(rows[0].logprob, greedy[0].logprob, atol=1e-4)
    begun: dict[str, Any] = dict(
        max_new_tokens=LIMIT, answer_prefixes=["a red circle,", "", "", "ein"]
    )
    tokens = [row.tokens for row in pali.prompt_lookup_generate(*asked, **begun)]
    assert tokens == [row.tokens for row in pali.generate(*asked, **begun)]


def test_lookup_of_objects_takes_fewer_passes(pali, picture):
    """As its documentation shows it, for one picture and for two."""
    tokenizer = pali.processor.tokenizer
    prompts = ["detect circle ; square"] * 2
    pattern = [pg.object_draft_corpus(tokenizer, "circle ; square"), []]
    rows = pali.prompt_lookup_generate(
        [picture] * 2,
        prompts,
        token_classes=pg.object_token_classes(tokenizer),
        draft_corpus=pattern,
        constraint=pg.detection_grammar(tokenizer, ["circle", "square"]),
        batch_size=1,
    )
    assert rows[0].tokens == rows[1].tokens and len(pg.parse_answer(rows[0].text).objects) > 1
    assert rows[0].tokens_per_forward_pass > 1.2
    passes = [row.forward_passes or 0 for row in rows]
    assert passes[0] < passes[1] < len(rows[0].tokens)


def test_results_say_why_they_ended_and_what_was_read(pali, asked, greedy):
    assert [row.finish_reason for row in greedy] == ["length", "eos", "length", "length"] or all(
        (row.finish_reason == "eos") == (row.tokens[-1] == 1) for row in greedy
    )
    patches = pali.config.img.num_patches
    assert [row.image_tokens for row in greedy] == [patches, 2 * patches, 0, patches]
    counts = [len(pali.processor.tokenizer.encode(prompt)) + 2 for prompt in asked[1]]
    assert [row.prompt_tokens for row in greedy] == counts


def test_a_value_for_each_prompt(pali, asked, greedy):
    """Different settings share a batch, and each prompt gets what it gets alone."""
    images, prompts = [asked[0][0], asked[0][3], asked[0][0]], ["caption en", "ocr", "caption de"]
    own: dict[str, list[Any]] = dict(
        temperature=[0, 3.0, 2.0],
        top_k=[None, 50, None],
        max_new_tokens=[16, 7, 12],
        seed=[0, 2**40, 5],
        stop=[["circle"], [], ["zzz"]],
    )
    together = pali.generate(images, prompts, **own)
    for i, row in enumerate(together):
        alone = {name: values[i] for name, values in own.items()}
        assert pali.generate([images[i]], [prompts[i]], **alone)[0].tokens == row.tokens
    assert together[0].stop == "circle" and len(together[1].tokens) <= 7


def test_defaults_of_a_pipeline(pali, asked, greedy):
    """As a checkpoint brings them; a keyword goes before them."""
    image, period = asked[0][0], pali.processor.tokenizer.encode(" circle")[-1]
    config = pg.GenerationConfig(eos_token_id=[1, period], max_new_tokens=9, temperature=2.0)
    other = dataclasses.replace(pali, generation_config=config)
    row = other.generate([image], [CAPTION], temperature=0)[0]
    assert row.finish_reason == "eos" and row.tokens[-1] == period
    assert other.caption(image) == other.generate([image], [CAPTION])[0].text
    given = other.generate([image], [CAPTION], config=pg.GenerationConfig(max_new_tokens=LIMIT))
    assert given[0].tokens == greedy[0].tokens
    assert len(other.beam_search([image], [CAPTION], num_beams=2)[0][0].tokens) <= 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": [1, 2]}, "seed: .* 1 prompts, got a list of 2"),
        ({"answer_prefixes": ["a", "b"]}, "answer_prefixes: .* 1 prompts, got a list of 2"),
        ({"answer_prefixes": "a"}, "answer_prefixes: .* a str"),
        ({"constraint": []}, "constraint: expected"),
        ({"stop": ""}, "stop: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"batch_size": 1.5}, "batch_size: expected"),
        ({"min_new_tokens": 200}, "min_new_tokens: expected"),
        ({"max_new_tokens": 10**9}, "max_new_tokens: expected"),
        ({"nucleus": 0.9}, "'top_p'"),
        ({"batchsize": 3}, "'batch_size'"),
        ({"num_beams": 3}, "beam_search"),
    ],
)
def test_requests_that_are_wrong(pali, picture, options: dict[str, Any], words: str):
    with pytest.raises(pg.PaliGemmaError, match=words):
        pali.generate([picture], [CAPTION], **options)


def test_errors_of_images_name_the_prompt_in_batches_of_any_size(pali, picture):
    for size in (1, 2, 8):
        with pytest.raises(pg.InvalidImageError, match=r"^images\[2\]: "):
            pali.generate([picture, picture, b"no image"], [CAPTION] * 3, batch_size=size)


def test_objects_end_with_the_tokenizer_s_eos_and_equal_labels_share_a_grammar(
    pali, picture, monkeypatch
):
    config = pg.GenerationConfig(eos_token_id=107)  # of another tokenizer
    foreign = dataclasses.replace(pali, generation_config=config)
    monkeypatch.setattr(constraints.PerSequence, "of", None)  # not needed
    how: dict[str, Any] = dict(max_objects=1, max_new_tokens=32)
    one, two = foreign.detect_batch([picture] * 2, [["cat"], ["cat"]], **how)
    assert one.text == two.text == pali.detect_batch([picture], "cat", **how)[0].text
    assert len(one) <= 1 and not one.unparsed


def test_wrong_requests_for_several_answers(pali, picture):
    with pytest.raises(pg.ConfigError, match="greedy samples"):
        pali.best_of([picture], [CAPTION], n=2, temperature=0)
    with pytest.raises(pg.ConfigError, match="n: expected"):
        pali.best_of([picture], [CAPTION], n=0)
    with pytest.raises(pg.ConfigError, match="num_beams: expected"):
        pali.beam_search([picture], [CAPTION], num_beams=0)
    with pytest.raises(pg.InvalidPromptError, match="a list of images"):
        pali.beam_search(picture, CAPTION)
    with pytest.raises(pg.InvalidPromptError, match="draft_corpus: "):
        pali.prompt_lookup_generate([picture], [CAPTION], draft_corpus=[[], []])
