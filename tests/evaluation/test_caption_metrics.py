"""Metrics of longer texts on cases worked out by hand, and on values of reference programs."""

import json
import math
from pathlib import Path

import pytest

from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.caption_metrics import stem
from paligemma_jax.evaluation.metrics import (
    CIDEr,
    Meteor,
    bleu,
    cider,
    indel_similarity,
    levenshtein,
    meteor,
    normalized_distance,
    perplexity,
    rouge_l,
    text_recognition,
    tokenize,
)
from paligemma_jax.evaluation.tasks import find_task
from paligemma_jax.evaluation.text_metrics import longest_common_subsequence

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "caption_metrics.json").read_text())


@pytest.mark.parametrize(
    ("first", "second", "distance", "common"),
    [
        ("", "", 0, 0),
        ("", "abc", 3, 0),
        ("abc", "", 3, 0),
        ("kitten", "sitting", 3, 4),
        ("flaw", "lawn", 2, 3),
        ("abc", "abc", 0, 3),
        ("a" * 200, "a" * 150 + "b", 50, 150),
        (["a", "cat"], ["a", "dog", "cat"], 1, 2),
    ],
)
def test_edit_distance(first, second, distance: int, common: int):
    assert levenshtein(first, second) == distance
    assert levenshtein(second, first) == distance
    assert longest_common_subsequence(first, second) == common


def test_ratio_of_roboflow_is_no_levenshtein_distance():
    assert indel_similarity("", "") == 1
    assert indel_similarity("abcd", "abxd") == 0.75
    assert normalized_distance("abcd", "axd") == 0.5
    assert normalized_distance("", "") == 0


def test_reading():
    result = text_recognition(["a cat", "the dgo", ""], ["a cat", "the dog", "no"])
    assert result["cer"] == pytest.approx((0 + 2 + 2) / (5 + 7 + 2))
    assert result["wer"] == pytest.approx((0 + 1 + 1) / (2 + 2 + 1))
    assert result["acc"] == pytest.approx(1 / 3)
    assert result["levenshtein_ratio"] == pytest.approx((1 + 12 / 14 + 0) / 3)
    assert result["edit_distance"] == pytest.approx((0 + 2 / 7 + 1) / 3)


def test_reading_of_nothing():
    assert text_recognition(["abc"], [""])["cer"] == 3
    assert text_recognition([""], [""])["cer"] == 0
    assert text_recognition(["a b"], ["x"])["wer"] == 2


def test_perplexity():
    result = perplexity([-2.0, -6.0], [2, 3])
    assert result["nll"] == 4
    assert result["nll_per_token"] == pytest.approx(1.5)
    assert result["nll_of_all_tokens"] == pytest.approx(1.6)
    assert result["perplexity"] == pytest.approx(math.exp(1.6))
    with pytest.raises(DatasetError) as e:
        perplexity([1.0, float("nan"), -1.0, "x", -1.0], [1, 1, 0, 1, 1])  # type: ignore[list-item]
    assert "(4 problems)" in str(e.value)


def test_words_are_those_of_the_java_tokenizer():
    wrong = {text: tokenize(text) for text, words in GOLDEN["tokens"] if tokenize(text) != words}
    assert not wrong


def test_words_where_java_differs():
    assert tokenize("call (555) 123-4567") == ["call", "-lrb-", "555", "-rrb-", "123-4567"]
    assert tokenize("") == tokenize(" \n\t ") == tokenize("...") == []


def test_caption_scores_are_those_of_pycocoevalcap():
    captions, references = GOLDEN["captions"], GOLDEN["references"]
    expected = GOLDEN["scores"]
    assert cider(captions, references)["cider"] == pytest.approx(expected["cider"], abs=1e-12)
    scores = bleu(captions, references)
    for n in range(1, 5):
        assert scores[f"bleu-{n}"] == pytest.approx(expected[f"bleu-{n}"], abs=1e-12)
    assert rouge_l(captions, references)["rouge-l"] == pytest.approx(expected["rouge-l"], abs=1e-12)
    metric = CIDEr().add_all(captions, references)
    assert list(metric.example_scores.values()) == pytest.approx(
        expected["cider of each"], abs=1e-12
    )


def test_meteor_is_that_of_the_java_program_without_tables():
    captions, references = GOLDEN["captions"], GOLDEN["references"]
    metric = Meteor().add_all(captions, references)
    assert list(metric.example_scores.values()) == pytest.approx(GOLDEN["scores"]["meteor of each"])
    assert metric.result()["meteor-exact-stem"] == pytest.approx(GOLDEN["scores"]["meteor"])


def test_a_caption_like_its_reference_and_one_unlike():
    words = ["a cat sits on a mat", "two dogs run"]
    same = cider(words, [[w] for w in words], tokenizer=str.split)
    # Both have n-grams of every length up to 4 but the second, which has none of 4.
    assert same["cider"] == pytest.approx((10 + 7.5) / 2)
    assert meteor(words, [[w] for w in words])["meteor-exact-stem"] > 0.9
    assert bleu(words[:1], [words[:1]])["bleu-4"] == pytest.approx(1)
    assert rouge_l(words, [["x"], ["y"]])["rouge-l"] == 0
    assert cider(["x", "y"], [["a b"], ["c d"]])["cider"] == 0
    assert meteor(["x"], [["a b"]])["meteor-exact-stem"] == 0


def test_empty_captions_and_one_picture():
    assert cider(["", "a cat"], [["a dog"], ["a cat"]])["cider"] > 0
    assert cider(["a cat"], [["a cat"]])["cider"] == 0  # every n-gram is in every image
    assert bleu([""], [["a cat"]])["bleu-1"] == 0
    assert rouge_l([""], [["a cat"]])["rouge-l"] == 0
    assert meteor([""], [["a cat"]])["meteor-exact-stem"] == 0
    with pytest.raises(DatasetError, match="there are no references"):
        cider(["a"], [[]])


def test_captions_by_language():
    metric = find_task("xm3600").metric()
    for i, language in enumerate(("en", "en", "de", "de")):
        words = ["a red car", "two big dogs"][i % 2]
        metric.add(i, words if language == "en" else "x", [words], group=language)
    result = metric.result()
    assert result["cider/mean"] == pytest.approx((result["cider/en"] + 0) / 2)
    assert "cider" not in result and "cider/others" not in result


@pytest.mark.parametrize(
    ("word", "expected"),
    [("running", "run"), ("cats", "cat"), ("flies", "fli"), ("hopping", "hop"), ("hoping", "hope"),
     ("nationality", "nation"), ("generously", "generous"), ("skies", "sky"), ("dying", "die"),
     ("happily", "happili"), ("controlling", "control"), ("by", "by"), ("sayings", "say"),
     ("relational", "relat"), ("agreed", "agre"), ("dog's", "dog"), ("succeed", "succeed")],
)  # fmt: skip
def test_stems(word: str, expected: str):
    assert stem(word) == expected
