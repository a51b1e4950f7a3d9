"""Rules by path: the first that matches a whole path holds; mistakes are errors."""

import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.sharding import Rules

PATHS = ("img/head/kernel", "img/head/bias", "llm/final_norm/scale", "llm/layers/mlp/linear/w")


def test_the_first_match_holds_and_must_be_whole():
    rules = Rules((("img/head/kernel", 1), (".*/w", 2), ("img/.*", 3), (".*", 4)))
    assert list(rules.cover(PATHS, "rates").values()) == [1, 3, 4, 2]
    assert rules.first("head/kernel", 0) == 4 and Rules((("head", 1),)).first("head/x", 0) == 0


def test_paths_without_a_rule():
    rules = Rules((("img/.*", 1),))
    assert rules.find(PATHS, "rates") == {"img/head/kernel": 1, "img/head/bias": 1}
    with pytest.raises(ConfigError, match=r"rates has no rule for 2 of 4 .*llm/final_norm/scale"):
        rules.cover(PATHS, "rates")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("img/haed/.*", "match no parameter: 'img/haed/.*' .*nearest path is 'img/head/"),
        ("head/kernel", "match no parameter: 'head/kernel'"),
        ("img/(", "no regular expression"),
    ],
)
def test_rules_that_cannot_be_meant(pattern: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Rules(((pattern, None), (".*", 1))).cover(PATHS, "schedules")
