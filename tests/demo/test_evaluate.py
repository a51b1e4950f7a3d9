"""What the demo model is measured with: ranked boxes, calibration."""

import numpy as np
import pytest

from checkpoints.training.box_scores import (
    Found,
    calibration_error,
    constant,
    location_geometric,
    reliability,
    roc_area,
)
from paligemma_jax.processing.box_scores import AnswerLogprobs, ObjectLogprobs
from paligemma_jax.processing.location_tokens import Box, ParsedAnswer

LEFT, RIGHT = Box("circle", 0, 0, 0.5, 0.5), Box("circle", 0.5, 0.5, 1, 1)


def weighed(*boxes: tuple[Box, float]) -> AnswerLogprobs:
    logprobs = tuple(ObjectLogprobs((0, 0, 9, 9), (logp,) * 4) for _, logp in boxes)
    return AnswerLogprobs(ParsedAnswer("", tuple(box for box, _ in boxes), ()), logprobs)


def test_a_score_that_knows_ranks_better_than_a_constant():
    wrong_first = weighed((RIGHT, -3.0), (LEFT, -0.1))
    found = Found([("circle",), ("circle",)], [[LEFT], [RIGHT]], [wrong_first, weighed()])
    assert found.precision(location_geometric) == pytest.approx(0.5)
    assert found.precision(constant) == pytest.approx(0.25)
    scores, right = found.judged(location_geometric)
    np.testing.assert_allclose(scores, np.exp([-3.0, -0.1]))
    assert right.tolist() == [False, True]


def test_roc_area():
    scores = np.array([0.1, 0.4, 0.4, 0.9])
    assert roc_area(scores, np.array([False, False, True, True])) == pytest.approx(3.5 / 4)
    assert np.isnan(roc_area(scores, np.ones(4, bool)))


def test_calibration():
    scores = np.array([0.85, 0.85, 0.85, 0.85, 0.25])
    right = np.array([True, True, True, False, False])
    bins = reliability(scores, right)
    assert [count for _, _, count in bins] == [1, 4]
    np.testing.assert_allclose([b[:2] for b in bins], [(0.25, 0), (0.85, 0.75)])
    assert calibration_error(scores, right) == pytest.approx((0.25 + 4 * 0.1) / 5)
    assert reliability(np.array([1.0]), np.array([True])) == [(1.0, 1.0, 1)]
