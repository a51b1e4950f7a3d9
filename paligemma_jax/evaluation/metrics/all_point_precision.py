"""Average precision of boxes at one overlap, all-point interpolated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values
from paligemma_jax.evaluation.metrics.box_overlap import box_overlaps
from paligemma_jax.evaluation.metrics.coco_detection import FoundBoxes, TrueBoxes
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.evaluation.metrics.totals import divide

_Row = Mapping[str, tuple[np.ndarray, np.ndarray, int]]  # of a class: scores, hits, objects


class AllPointPrecision(Accumulator):
    """`ap` in 0..1: mean over classes of the area under the whole precision-recall curve.

    The precision at a recall is the best one at this recall or a higher one. Boxes are ranked by
    score over all pictures. In each picture the best box chooses first: it is right if the object
    of its label that it overlaps most does so by at least `iou` and is not taken yet. Classes
    without objects are left out. With `last_word` a class is the last word of its labels ("red
    circle" and "blue circle" are both of "circle"); boxes are compared by the whole label all the
    same. A prediction is `FoundBoxes`, a reference `TrueBoxes` (crowds and areas are not looked
    at). Source: Everingham et al. 2010, The Pascal VOC Challenge, as it was from 2010 on.
    """

    main = "ap"
    fits = "FoundBoxes(xyxy, labels, scores) and TrueBoxes(xyxy, labels) fit."

    def __init__(self, iou: float = 0.5, last_word: bool = False):
        super().__init__()
        self.iou = iou
        self.last_word = last_word

    def _row(self, prediction: Any, reference: Any) -> _Row:
        if not isinstance(prediction, FoundBoxes) or not isinstance(reference, TrueBoxes):
            kinds = f"{type(prediction).__name__} and {type(reference).__name__}"
            raise Misfit(f"prediction and reference are {kinds}, not FoundBoxes and TrueBoxes")
        if prediction.scores is None and len(prediction.labels):
            raise Misfit("the boxes have no scores")
        found, scores = _boxes(prediction.xyxy), np.array(prediction.scores or (), np.float64)
        labels, right = np.array(prediction.labels, object), _boxes(reference.xyxy)
        names = np.array(reference.labels, object)
        if not len(found) == len(labels) == len(scores) or len(right) != len(names):
            raise Misfit("there is not one label and one score for each box")
        rows: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        for label in sorted({*labels, *names}):
            mine, truths = labels == label, right[names == label]
            hits = _hits(found[mine], scores[mine], truths, self.iou)
            name = label.split()[-1] if self.last_word and label.split() else label
            others = rows.get(name, (np.zeros(0), np.zeros(0, bool), 0))
            rows[name] = (
                np.concatenate([others[0], scores[mine]]),
                np.concatenate([others[1], hits]),
                others[2] + len(truths),
            )
        return rows

    def _measure(self, rows: Sequence[_Row]) -> Measure:
        names = sorted({name for row in rows for name, (_, _, n) in row.items() if n})
        curves = [_Curve([row.get(name) for row in rows]) for name in names]

        def measure(weights: np.ndarray) -> Values:
            every = np.array([c.area(weights) for c in curves] or [np.full(len(weights), np.nan)])
            there = ~np.isnan(every)
            return {self.main: divide(np.nansum(every, axis=0), there.sum(axis=0))}

        return measure

    def _scores(self, rows: Sequence[_Row]) -> np.ndarray:
        """F1 of the picture; 1 where there is nothing and nothing was found."""
        counts = [[(h.sum(), len(h), n) for _, h, n in row.values()] or [(0, 0, 0)] for row in rows]
        right, found, objects = np.array([np.sum(row, axis=0) for row in counts], np.float64).T
        return divide(2 * right, found + objects, 1.0)


class _Curve:
    """Of one class: its boxes by falling score, ties in the order of pictures."""

    def __init__(self, pictures: Sequence[tuple[np.ndarray, np.ndarray, int] | None]):
        some = [(place, *one) for place, one in enumerate(pictures) if one is not None]
        self._objects = np.zeros(len(pictures))
        for place, _, _, objects in some:
            self._objects[place] = objects
        scores = np.concatenate([s for _, s, _, _ in some])
        order = np.argsort(-scores, kind="stable")
        self._hits = np.concatenate([h for _, _, h, _ in some])[order]
        picture = np.concatenate([np.full(len(s), place) for place, s, _, _ in some])
        self._picture = picture[order].astype(int)

    def area(self, weights: np.ndarray) -> np.ndarray:
        """f64[R] where pictures count weights f64[R, n] times; NaN without objects."""
        objects = weights @ self._objects
        counted = weights[:, self._picture]
        right = np.cumsum(counted * self._hits, axis=1)
        precision = divide(right, np.cumsum(counted, axis=1), 0.0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = right / np.maximum(objects, 1)[:, None]
        area = np.sum(np.diff(recall, prepend=0.0, axis=1) * envelope, axis=1)
        return np.where(objects > 0, area, np.nan)


def _hits(found: np.ndarray, scores: np.ndarray, truths: np.ndarray, iou: float) -> np.ndarray:
    """bool[D]: which boxes are right."""
    hits = np.zeros(len(found), bool)
    if not len(truths) or not len(found):
        return hits
    overlaps = box_overlaps(found, truths)
    taken: set[int] = set()
    for place in np.argsort(-scores, kind="stable"):
        best = int(np.argmax(overlaps[place]))
        hits[place] = overlaps[place, best] >= iou and best not in taken
        if hits[place]:
            taken.add(best)
    return hits


def _boxes(xyxy: Any) -> np.ndarray:
    try:
        return np.asarray(xyxy, np.float64).reshape(-1, 4)
    except (TypeError, ValueError) as e:
        raise Misfit("the boxes are not x1, y1, x2, y2 each") from e
