"""Confidence intervals: their formula, their seed, their units."""

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.answer_metrics import ExactMatch, OfPair, PairedAccuracy, Reading
from paligemma_jax.evaluation.metric import ByGroup, Grouped, bootstrap


def matches(right: int, wrong: int) -> ExactMatch:
    return ExactMatch().add_all(["x"] * right + ["y"] * wrong, ["x"] * (right + wrong))


def test_share_is_as_wide_as_the_normal_approximation():
    interval = bootstrap(matches(300, 100), resamples=4000)["acc"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.005)
    assert interval.high == pytest.approx(0.75 + half, abs=0.005)


def test_seed_decides_and_memory_does_not(monkeypatch: pytest.MonkeyPatch):
    import importlib

    module = importlib.import_module("paligemma_jax.evaluation.metric")
    first = bootstrap(matches(30, 20), resamples=50, seed=1)
    monkeypatch.setattr(module, "_CELLS", 120)
    assert bootstrap(matches(30, 20), resamples=50, seed=1) == first
    assert bootstrap(matches(30, 20), resamples=50, seed=2) != first


def test_narrower_with_less_confidence():
    wide = bootstrap(matches(30, 20), resamples=300)["acc"]
    narrow = bootstrap(matches(30, 20), resamples=300, confidence=0.5)["acc"]
    assert wide.low < narrow.low < narrow.high < wide.high


def test_groups_are_drawn_whole():
    metric = ExactMatch().add_all(["x"] * 20 + ["y"] * 20, ["x"] * 40)
    together = {i: i < 20 for i in range(40)}
    drawn = bootstrap(metric, resamples=400, groups=together)["acc"]
    assert (drawn.low, drawn.high) == (0.0, 1.0)


def test_pairs_are_drawn_whole():
    metric = PairedAccuracy()
    for i in range(20):
        metric.add(i, "a" if i < 10 else "b", OfPair(i // 2, "a"))
    drawn = bootstrap(metric, resamples=100)
    assert drawn["pair_acc"] == drawn["acc"]  # pairs are all right or all wrong here


def test_a_group_that_is_seldom_drawn():
    metric = ByGroup(ExactMatch(), {"mean": None})
    for i in range(20):
        metric.add(i, "x" if i % 2 else "y", Grouped("rare" if i == 0 else "often", "x"))
    drawn = bootstrap(metric, resamples=60)
    assert drawn["acc/rare"].low == drawn["acc/rare"].high == 0
    assert np.isfinite([drawn["acc/mean"].low, drawn["acc/mean"].high]).all()


def test_figures_that_are_no_means_agree_with_duplicated_examples():
    texts = [("a cat", "a cat"), ("dog", "a dog"), ("", "bird"), ("redd", "red")]
    metric = Reading().add_all([p for p, _ in texts], [r for _, r in texts])
    weights = np.array([[2.0, 0, 1, 3]])
    drawn = [text for text, w in zip(texts, [2, 0, 1, 3], strict=True) for _ in range(w)]
    expected = Reading().add_all([p for p, _ in drawn], [r for _, r in drawn]).result()
    for name, value in metric.measure()(weights).items():
        assert value[0] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ConfigError, match="do not fit"):
        bootstrap(matches(1, 1), **settings)
