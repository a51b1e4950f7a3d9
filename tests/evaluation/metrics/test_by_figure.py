"""Average precision over all points, pairs of masks, and figures that have their own examples."""

import numpy as np
import pytest

from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.answer_metrics import ExactMatch
from paligemma_jax.evaluation.detection_metrics import (
    AllPointPrecision,
    FoundBoxes,
    MaskPairs,
    TrueBoxes,
    paired_overlaps,
)
from paligemma_jax.evaluation.metric import ByFigure, OfFigure, bootstrap

LEFT, RIGHT, NOTHING = [0, 0, 5, 10], [5, 0, 10, 10], TrueBoxes([], [])


def found(*scored: tuple[list[int], float], label: str = "a") -> FoundBoxes:
    return FoundBoxes([b for b, _ in scored], [label] * len(scored), [s for _, s in scored])


@pytest.mark.parametrize(
    ("pictures", "ap"),
    [
        ([(found((LEFT, 0.9), (RIGHT, 0.8)), TrueBoxes([LEFT, RIGHT], ["a", "a"]))], 1.0),
        # A false alarm costs nothing with a low score, and half with a high one.
        ([(found((LEFT, 0.9)), TrueBoxes([LEFT], ["a"])), (found((LEFT, 0.1)), NOTHING)], 1.0),
        ([(found((LEFT, 0.1)), TrueBoxes([LEFT], ["a"])), (found((LEFT, 0.9)), NOTHING)], 0.5),
        # A box counts once.
        ([(found((LEFT, 0.9), (LEFT, 0.8)), TrueBoxes([LEFT, RIGHT], ["a", "a"]))], 0.5),
        # Nothing found; classes without objects are left out.
        ([(found(), TrueBoxes([LEFT], ["a"]))], 0.0),
        ([(found((LEFT, 1)), TrueBoxes([LEFT], ["a"])), (found((LEFT, 1), label="b"), NOTHING)], 1),
        # Of one class, and yet not each other's: "red a" finds no "blue a".
        ([(found((LEFT, 0.9), label="red a"), TrueBoxes([LEFT], ["blue a"]))], 0.0),
    ],
)  # fmt: skip
def test_all_point_precision(pictures: list[tuple[FoundBoxes, TrueBoxes]], ap: float):
    metric = AllPointPrecision(last_word=True)
    for id, (prediction, reference) in enumerate(pictures):
        metric.add(id, prediction, reference)
    assert metric.result()["ap"] == pytest.approx(ap)


def test_boxes_that_do_not_fit():
    for prediction in (FoundBoxes([LEFT], ["a"]), FoundBoxes([LEFT], [], [0.5]), "a"):
        with pytest.raises(DatasetError):
            AllPointPrecision().add(0, prediction, NOTHING)


def mask(*columns: int) -> np.ndarray:
    picture = np.zeros((2, 8), bool)
    picture[:, list(columns)] = True
    return picture


def test_masks_are_paired_best_first_and_rest_counts_nothing():
    right = np.stack([mask(0, 1), mask(4, 5)])
    assert paired_overlaps(right[::-1], right) == [1.0, 1.0]
    found = np.stack([mask(0), mask(0, 1)])  # the second is the better partner of the first
    assert paired_overlaps(found, right) == [1.0, 0.0]
    assert paired_overlaps(np.zeros((0, 2, 8), bool), right) == [0.0, 0.0]
    assert sorted(paired_overlaps(np.concatenate([right, right[:1]]), right)) == [0.0, 1.0, 1.0]
    metric = MaskPairs().add_all([right, found[:1]], [right, right[:1]])
    assert metric.result()["miou"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert metric.scores == {0: 1.0, 1: 0.5}
    with pytest.raises(DatasetError, match="not \\[n, H, W\\] of one"):
        metric.add(2, right, right[:, :1])


def test_figures_have_their_own_examples_and_pictures_are_drawn_whole():
    def make(part: int) -> ByFigure:
        of = {"words": (ExactMatch(), "acc"), "colours": (ExactMatch(), "acc")}
        metric = ByFigure(of | {"masks": (MaskPairs(), "miou")})
        for unit in range(part, 20, 2):
            answer = "red" if unit % 4 else "blue"
            metric.add(f"{unit} colour", answer, OfFigure("colours", "red", unit, ("words",)))
            metric.add(f"{unit} name", answer, OfFigure("words", "red", unit))
            right = np.stack([mask(0, 1)])
            found = right if unit % 4 else np.stack([mask(1)])
            metric.add(f"{unit} mask", found, OfFigure("masks", right, unit))
        return metric

    whole, other = make(0), make(1)
    whole.merge(other)
    assert whole.result() == {
        "words": 0.75, "colours": 0.75, "masks": 0.875, "num": 60, "left_out": 0,
        "num/words": 40, "num/colours": 20, "num/masks": 20,
    }  # fmt: skip
    intervals = bootstrap(whole, resamples=200)
    # All that is asked about a picture is right or wrong together here.
    assert intervals["words"] == intervals["colours"]
    assert intervals["masks"].low == pytest.approx(0.5 + intervals["words"].low / 2)
    with pytest.raises(DatasetError, match="of none of the figures"):
        whole.add("x", "red", OfFigure("sounds", "red", 1))
