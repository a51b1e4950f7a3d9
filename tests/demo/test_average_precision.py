"""Average precision on cases worked out by hand."""

from paligemma_jax.demo.average_precision import (
    Prediction,
    average_precision,
    mean_average_precision,
)
from paligemma_jax.processing.parsing import Box

LEFT = Box("a", 0.0, 0.0, 1.0, 0.5)
RIGHT = Box("a", 0.0, 0.5, 1.0, 1.0)
MIDDLE = Box("a", 0.0, 0.25, 1.0, 0.75)


def test_all_found():
    found = [Prediction(0, LEFT, 0.9), Prediction(0, RIGHT, 0.8)]
    assert average_precision({0: [LEFT, RIGHT]}, found, 0.5) == 1.0


def test_a_false_alarm_with_a_low_score_costs_nothing_and_with_a_high_one_half():
    truth = {0: [LEFT], 1: []}
    low = [Prediction(0, LEFT, 0.9), Prediction(1, LEFT, 0.1)]
    high = [Prediction(0, LEFT, 0.1), Prediction(1, LEFT, 0.9)]
    assert average_precision(truth, low, 0.5) == 1.0
    assert average_precision(truth, high, 0.5) == 0.5


def test_a_box_counts_once():
    twice = [Prediction(0, LEFT, 0.9), Prediction(0, LEFT, 0.8)]
    assert average_precision({0: [LEFT, RIGHT]}, twice, 0.5) == 0.5


def test_nothing_found_and_classes_without_truth():
    assert average_precision({0: [LEFT]}, [], 0.5) == 0.0
    truths = {"a": {0: [LEFT]}, "b": {0: []}}
    assert mean_average_precision(truths, {"a": [Prediction(0, LEFT, 1.0)]}, 0.5) == 1.0
