"""Metrics of boxes and masks on cases worked out by hand, and beside pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.metrics import (
    AllPointPrecision,
    BoxDetection,
    FoundBoxes,
    MaskPairs,
    ObjectMask,
    ReferringSegmentation,
    TrueBoxes,
    bootstrap,
    box_detection,
    paired_overlaps,
    referring_segmentation,
)

LABELS = ["a", "b", "c", "d"]
SCORES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def rectangle(x1: int, y1: int, x2: int, y2: int) -> ObjectMask:
    mask = np.zeros((10, 20), bool)
    mask[y1:y2, x1:x2] = True
    return ObjectMask(mask, (x1, y1, x2, y2))


def test_masks():
    right = [rectangle(0, 0, 10, 10), rectangle(0, 0, 2, 2), rectangle(0, 0, 2, 2)]
    found = [rectangle(0, 0, 10, 5), rectangle(0, 0, 2, 2), None]
    result = referring_segmentation(found, right)
    assert result["miou"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert result["ciou"] == pytest.approx((50 + 4 + 0) / (100 + 4 + 4))
    assert result["precision/0.5"] == pytest.approx(1 / 3)  # 0.5 is not above 0.5
    assert result["boxacc/0.5"] == pytest.approx(2 / 3)  # but at least 0.5
    assert result["boxacc/0.75"] == pytest.approx(1 / 3)
    assert result["invalid"] == pytest.approx(1 / 3)


def test_wrong_masks():
    good = rectangle(0, 0, 2, 2)
    other = ObjectMask(np.ones((3, 3), bool), (0, 0, 3, 3))
    numbers = ObjectMask(np.ones((10, 20)), (0, 0, 1, 1))
    empty = ObjectMask(np.zeros((10, 20), bool), (0, 0, 1, 1))
    twisted = ObjectMask(good.mask, (2, 0, 0, 2))
    with pytest.raises(DatasetError) as e:
        ReferringSegmentation().add_all(
            [other, numbers, good, twisted, good.mask], [good, good, empty, good, good]
        )
    for said in (
        "0: expected masks of one size, got (3, 3) and (10, 20)",
        "1: expected the mask of the prediction to be bool[H, W], got float64[10, 20]",
        "2: the mask of the reference is empty",
        "3: expected x1 <= x2, y1 <= y2 of the prediction, got (2, 0, 0, 2)",
        "4: expected the prediction to be an ObjectMask, got ndarray",
    ):
        assert said in str(e.value)


def random_scenes(count: int, seed: int = 0) -> tuple[list[FoundBoxes], list[TrueBoxes]]:
    """Objects of all sizes, some crowds; boxes near them, some with another label, tied scores."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(count):
        n, k = rng.integers(0, 8), rng.integers(0, 12)
        corner = rng.uniform(0, 400, (n, 2))
        size = rng.choice([15, 60, 200], (n, 1)) * rng.uniform(0.5, 1.5, (n, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        labels = [LABELS[i] for i in rng.integers(0, 3, n)]
        truth.append(TrueBoxes(boxes, labels, (rng.random(n) < 0.1).tolist()))
        source = rng.integers(0, n, k) if n else np.zeros(0, int)
        moved = boxes[source] + rng.normal(0, 4, (len(source), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        names = [labels[i] if rng.random() < 0.8 else LABELS[rng.integers(4)] for i in source]
        found.append(FoundBoxes(moved, names, np.round(rng.random(len(source)), 1).tolist()))
    return found, truth


def to_coco(
    found: list[FoundBoxes], truth: list[TrueBoxes]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def rows(side: Sequence[FoundBoxes | TrueBoxes], extra: str) -> list[dict[str, Any]]:
        return [
            {"image_id": image, "category_id": LABELS.index(label), "bbox": [*box[:2], *size]}
            | {"area": size.prod(), extra: float(value)}
            for image, boxes in enumerate(side)
            for box, size, label, value in zip(
                boxes.xyxy,
                boxes.xyxy[:, 2:] - boxes.xyxy[:, :2],
                boxes.labels,
                (boxes.scores if isinstance(boxes, FoundBoxes) else boxes.crowd) or (),
                strict=True,
            )
        ]

    objects = [row | {"id": n + 1} for n, row in enumerate(rows(truth, "iscrowd"))]
    images = [{"id": i} for i in range(len(truth))]
    categories = [{"id": i} for i in range(len(LABELS))]
    dataset = {"images": images, "annotations": objects, "categories": categories}
    return dataset, rows(found, "score")


@pytest.fixture(scope="module")
def scenes() -> tuple[list[FoundBoxes], list[TrueBoxes]]:
    return random_scenes(40)


def test_average_precision_is_that_of_pycocotools(scenes):
    coco = pytest.importorskip("pycocotools.coco", reason="the extra dev has pycocotools")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    dataset, detections = to_coco(*scenes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = box_detection(*scenes)
    for name, value in zip(SCORES, evaluation.stats, strict=True):
        assert result[name] == pytest.approx(value, abs=1e-12), name


def test_weights_are_as_good_as_duplicates(scenes):
    found, truth = scenes
    rng = np.random.default_rng(1)
    # Two boxes of one picture with one score would change places with those of its duplicate.
    found = [FoundBoxes(f.xyxy, f.labels, rng.random(len(f.labels)).tolist()) for f in found]
    weights = rng.integers(0, 3, len(found))
    metric = BoxDetection().add_all(found, truth)
    drawn = [i for i, w in enumerate(weights) for _ in range(w)]
    expected = box_detection([found[i] for i in drawn], [truth[i] for i in drawn])
    for name, value in metric.measure()(weights[None].astype(float)).items():
        assert value[0] == pytest.approx(expected[name], abs=1e-9), name
    interval = bootstrap(metric, resamples=50)["AP50"]
    assert interval.low < interval.value < interval.high


BOX, FAR = (0, 0, 40, 40), (100, 100, 140, 140)


@pytest.mark.parametrize(
    ("boxes", "scores", "ap50"),
    [
        ([BOX, FAR], [0.9, 0.8], 1.0),
        ([BOX], [0.9], 51 / 101),  # recalls 0, 0.01 ... 0.5
        ([BOX, BOX], [0.9, 0.8], 51 / 101),  # an object is found once
        ([(300, 0, 340, 40), BOX, FAR], [0.9, 0.5, 0.4], 2 / 3),
        ([BOX, FAR, (300, 0, 340, 40)], [0.9, 0.5, 0.4], 1.0),
        ([], [], 0.0),
    ],
)
def test_average_precision_by_hand(boxes, scores, ap50: float):
    found = FoundBoxes(boxes, ["a"] * len(boxes), scores)
    result = box_detection([found], [TrueBoxes([BOX, FAR], ["a", "a"])])
    assert result["AP50"] == pytest.approx(ap50)
    assert "APs" not in result  # there are no small objects
    assert result["APm"] == pytest.approx(result["AP"])


def test_all_boxes_together_at_half():
    found = FoundBoxes([BOX, (300, 0, 340, 40)], ["a", "b"], [0.9, 0.8])
    metric = BoxDetection()
    metric.add(1, found, TrueBoxes([BOX, FAR], ["a", "a"]))
    metric.add(2, FoundBoxes([], [], []), TrueBoxes([], []))
    result = metric.result()
    assert (result["precision@50"], result["recall@50"], result["f1@50"]) == (0.5, 0.5, 0.5)
    assert metric.example_scores == {1: 0.5, 2: 1.0}


def test_without_scores_the_order_of_boxes_ranks_them():
    truth = TrueBoxes([BOX], ["a"])
    first = FoundBoxes([BOX, FAR], ["a", "a"])
    last = FoundBoxes([FAR, BOX], ["a", "a"])
    assert box_detection([first], [truth], scored=False)["AP50"] == pytest.approx(1)
    assert box_detection([last], [truth], scored=False)["AP50"] == pytest.approx(0.5)
    with pytest.raises(DatasetError, match=r"no scores \(without: BoxDetection\(scored=False\)\)"):
        box_detection([first], [truth])


def test_wrong_boxes():
    good, truth = FoundBoxes([BOX], ["a"], [1.0]), TrueBoxes([BOX], ["a"])
    cases = [
        (FoundBoxes([BOX], ["a", "b"], [1.0]), truth, "[2, 4], one for each label, got [1, 4]"),
        (
            FoundBoxes([BOX], ["a"], [1.0, 2.0]),
            truth,
            "expected scores [1], one for each",
        ),
        (FoundBoxes([BOX], ["a"], [float("nan")]), truth, "the scores are not all finite"),
        (FoundBoxes([(9, 0, 1, 1)], ["a"], [1.0]), truth, "expected x1 <= x2, y1 <= y2"),
        (
            FoundBoxes([BOX[:3]], ["a"], [1.0]),
            truth,
            "[1, 4], one for each label, got [1, 3]",
        ),
        (FoundBoxes("boxes", ["a"], [1.0]), truth, "are not numbers"),
        (good, [BOX], "expected FoundBoxes and TrueBoxes, got FoundBoxes and list"),
        (good, TrueBoxes([BOX], [1]), "expected every label to be a string, got 1 (int)"),  # type: ignore[list-item]
    ]
    with pytest.raises(DatasetError) as e:
        BoxDetection().add_all([c[0] for c in cases], [c[1] for c in cases])
    for _, _, said in cases:
        assert said in str(e.value)


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
    assert metric.example_scores == {0: 1.0, 1: 0.5}
    with pytest.raises(DatasetError, match="of one height and width"):
        metric.add(2, right, right[:, :1])
