"""Scores of labels -> probabilities."""

import json
import math

import numpy as np
import pytest

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.generation.scoring import PerToken, ScoredAnswer, WholeAnswer, classify


def answer(text: str, *probabilities: float) -> ScoredAnswer:
    tokens = tuple(range(3, 2 + len(probabilities))) + (1,)
    return ScoredAnswer(text, tokens, tuple(math.log(p) for p in probabilities))


CAT = answer("cat", 0.5, 0.8)
LEOPARD = answer("snow leopard", 0.4, 0.9, 0.5, 0.5)


def test_an_answer_adds_up():
    assert LEOPARD.probability == pytest.approx(0.4 * 0.9 * 0.5 * 0.5)
    assert LEOPARD.length == 4 and str(CAT) == "-0.916 cat"
    assert json.loads(json.dumps(CAT.to_dict()))["logprob"] == pytest.approx(math.log(0.4))


def test_probabilities_are_bayes_rule():
    found = classify([LEOPARD, CAT])
    assert found.probabilities == pytest.approx((0.09 / 0.49, 0.4 / 0.49))
    assert found.labels == ("snow leopard", "cat") and found.best == "cat"
    assert found.coverage == pytest.approx(0.49)
    assert found == classify([LEOPARD, CAT], WholeAnswer())


def test_per_token_takes_the_geometric_mean():
    found = classify([LEOPARD, CAT], PerToken())
    means = np.array([0.09**0.25, 0.4**0.5])
    assert found.probabilities == pytest.approx(means / means.sum())


def test_what_no_float_holds_still_compares():
    found = classify([ScoredAnswer("a", (1,), (-5000.0,)), ScoredAnswer("b", (1,), (-5001.0,))])
    assert found.probabilities == pytest.approx((1 / (1 + math.exp(-1)), 1 / (1 + math.e)))
    assert found.coverage == 0 and found.best == "a"


def test_reads_well():
    found = classify([LEOPARD, CAT])
    assert str(found) == "0.816 cat\n0.184 snow leopard"
    values = json.loads(json.dumps(found.to_dict()))
    assert values["label"] == "cat" and [row["label"] for row in values["labels"]] == [
        "cat",
        "snow leopard",
    ]


def test_a_label_twice_is_refused_when_scored_too():
    with pytest.raises(InvalidPromptError, match="comes twice"):
        classify([CAT, CAT])
