"""Average precision and recall of boxes, by COCO's rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values
from paligemma_jax.evaluation.metrics.box_overlap import box_areas
from paligemma_jax.evaluation.metrics.coco_curves import LabelCurves
from paligemma_jax.evaluation.metrics.coco_matching import AREAS, MOST, THRESHOLDS, Matches, match
from paligemma_jax.evaluation.metrics.misfit import Misfit, check_texts
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import divide


@dataclasses.dataclass(frozen=True)
class FoundBoxes:
    """All boxes found in one picture: xyxy [n, 4] in pixels, a label and a score of each.

    `scores` may be None where the metric does not use them.
    """

    xyxy: Any
    labels: Sequence[str]
    scores: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class TrueBoxes:
    """All objects of one picture: xyxy [n, 4] in pixels, and a label of each.

    `crowd` marks boxes around many objects, which may be found any number of times or not at all.
    `areas` in pixels, by which COCO tells small objects from large ones, are those of the boxes
    where they are not given (COCO gives those of the masks).
    """

    xyxy: Any
    labels: Sequence[str]
    crowd: Sequence[bool] | None = None
    areas: Sequence[float] | None = None


class BoxDetection(Accumulator):
    """COCO's figures in 0..1, each a mean over labels that have objects.

    `AP`: area under the precision-recall curve (the highest precision at 101 recalls 0, 0.01, ...
    or beyond), mean over overlaps 0.5, 0.55, ... 0.95; `AP50` and `AP75` at one overlap; `APs`,
    `APm`, `APl` of objects below 32^2, between, and above 96^2 pixels. `AR1`, `AR10`, `AR100`:
    recall with as many detections a picture and label, mean over overlaps; `ARs`, `ARm`, `ARl` by
    size with 100. Figures of sizes that no object has are left out. `precision@50`, `recall@50` and
    `f1@50` are of all boxes together at overlap 0.5, whatever their scores.

    Detections are ranked by score. PaliGemma gives none of its own: this library makes one of the
    probabilities of the tokens. `scored=False` gives all the same score; then pictures are ranked
    by id and boxes as they were written, so that AP depends on that order. A prediction is
    `FoundBoxes`, a reference `TrueBoxes`. Source: Lin et al. 2014, Microsoft COCO; equal to
    pycocotools.
    """

    fits = (
        "FoundBoxes(xyxy, labels, scores) and TrueBoxes(xyxy, labels) fit: x1 <= x2, y1 <= y2, in "
        "pixels, one label and score a box."
    )

    def __init__(self, scored: bool = True):
        super().__init__()
        self.scored = scored

    def _row(self, prediction: Any, reference: Any) -> dict[str, Matches]:
        if not isinstance(prediction, FoundBoxes) or not isinstance(reference, TrueBoxes):
            kinds = f"{type(prediction).__name__} and {type(reference).__name__}"
            raise Misfit(f"prediction and reference are {kinds}, not FoundBoxes and TrueBoxes")
        boxes, labels = _check_boxes(prediction.xyxy, prediction.labels, "prediction")
        truths, names = _check_boxes(reference.xyxy, reference.labels, "reference")
        scores = self._scores_of(prediction, len(boxes))
        crowd = _column(reference.crowd, np.zeros(len(truths)), "crowd marks").astype(bool)
        areas = _column(reference.areas, box_areas(truths), "areas")
        matches = {}
        for label in sorted({*labels, *names}):
            mine, right = labels == label, names == label
            matches[str(label)] = match(
                boxes[mine], scores[mine], truths[right], areas[right], crowd[right]
            )
        return matches

    def _scores_of(self, prediction: FoundBoxes, count: int) -> np.ndarray:
        if self.scored and prediction.scores is None and count:
            raise Misfit("the boxes have no scores (without: BoxDetection(scored=False))")
        given = prediction.scores if self.scored else None
        return _column(given, np.ones(count), "scores")

    def _measure(self, rows: Sequence[Mapping[str, Matches]]) -> Measure:
        labels = sorted({label for row in rows for label in row})
        every = [LabelCurves([row.get(label) for row in rows]) for label in labels]
        counts = np.array([_counts_at_half(row) for row in rows])
        half, three_quarters = [0], [5]
        whole = list(range(len(THRESHOLDS)))

        def measure(weights: np.ndarray) -> Values:
            values: Values = {}
            for place, area in enumerate(AREAS):
                curves = [curve for curve in every if curve.objects[:, place].any()]
                if not curves:
                    continue
                precisions = _mean([c.precision(weights, place) for c in curves])  # f64[R, T]
                values[f"AP{area}"] = precisions[:, whole].mean(axis=1)
                if not area:
                    values["AP50"] = precisions[:, half].mean(axis=1)
                    values["AP75"] = precisions[:, three_quarters].mean(axis=1)
                for most in (MOST,) if area else (1, 10, MOST):
                    recalls = _mean([c.recall(weights, place, most) for c in curves])
                    values[f"AR{area or most}"] = recalls.mean(axis=1)
            right, wrong, objects = (weights @ counts).T
            precision, recall = divide(right, right + wrong, 0.0), divide(right, objects, 0.0)
            f1 = divide(2 * precision * recall, precision + recall, 0.0)
            return values | {"precision@50": precision, "recall@50": recall, "f1@50": f1}

        return measure

    def _scores(self, rows: Sequence[Mapping[str, Matches]]) -> np.ndarray:
        """F1 of the picture at overlap 0.5; 1 where there is nothing and nothing was found."""
        right, wrong, objects = np.array([_counts_at_half(row) for row in rows]).T
        return divide(2 * right, right + wrong + objects, 1.0)


def box_detection(
    predictions: Examples[FoundBoxes],
    references: Examples[TrueBoxes],
    *,
    scored: bool = True,
) -> dict[str, float]:
    """`BoxDetection` of lists or mappings; raises DatasetError."""
    return BoxDetection(scored).add_all(predictions, references).result()


def _counts_at_half(row: Mapping[str, Matches]) -> tuple[float, float, float]:
    """Right and wrong detections at overlap 0.5 of any size, and objects."""
    found = [(m.found[0, 0] & ~m.ignored[0, 0]).sum() for m in row.values()]
    wrong = [(~m.found[0, 0] & ~m.ignored[0, 0]).sum() for m in row.values()]
    return float(sum(found)), float(sum(wrong)), float(sum(m.objects[0] for m in row.values()))


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Over labels, but those that a sample has no objects of."""
    stacked = np.array(values)
    present = ~np.isnan(stacked)
    return divide(np.nansum(stacked, axis=0), present.sum(axis=0))


def _check_boxes(xyxy: Any, labels: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        boxes = np.asarray(xyxy, np.float64)
    except (TypeError, ValueError) as e:
        raise Misfit(f"the boxes of the {what} are no numbers") from e
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise Misfit(f"the boxes of the {what} are of shape {list(boxes.shape)}, not [n, 4]")
    boxes = boxes.reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise Misfit(f"the boxes of the {what} are not all finite")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        wrong = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1)][0].tolist()
        raise Misfit(f"the box {wrong} of the {what} is not x1 <= x2, y1 <= y2")
    names = check_texts(labels, "label", len(boxes)) if len(boxes) else []
    return boxes, np.array(names, object)


def _column(values: Any, default: np.ndarray, what: str) -> np.ndarray:
    """One finite number a box."""
    if values is None:
        return default
    try:
        column = np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise Misfit(f"the {what} are no numbers") from e
    if column.shape != default.shape:
        raise Misfit(f"there are {column.size} {what}, not one for each of {default.size} boxes")
    if not np.isfinite(column).all():
        raise Misfit(f"the {what} are not all finite")
    return column
