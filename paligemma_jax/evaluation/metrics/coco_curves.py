"""Precision and recall of one label over many pictures, by COCO's rule."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.coco_matching import AREAS, MOST, THRESHOLDS, Matches

_RECALLS = np.linspace(0, 1, 101)
_SMALL = np.spacing(1)


class LabelCurves:
    """Detections of one label in all pictures, by falling score; ties in the order of pictures."""

    def __init__(self, pictures: Sequence[Matches | None]):
        """One entry a picture; None where it has neither objects nor detections of the label."""
        some = [(place, m) for place, m in enumerate(pictures) if m is not None]
        self.objects = np.zeros((len(pictures), len(AREAS)))  # that count, of each size
        for place, matches in some:
            self.objects[place] = matches.objects
        scores = np.concatenate([np.zeros(0), *[m.scores for _, m in some]])
        order = np.argsort(-scores, kind="mergesort")
        picture = [np.full(len(m.scores), place) for place, m in some]
        rank = [np.arange(len(m.scores)) for _, m in some]
        self._picture = np.concatenate([np.zeros(0, int), *picture])[order]
        self._rank = np.concatenate([np.zeros(0, int), *rank])[order]
        empty = np.zeros((len(AREAS), len(THRESHOLDS), 0), bool)
        found = np.concatenate([empty, *[m.found for _, m in some]], axis=-1)[..., order]
        ignored = np.concatenate([empty, *[m.ignored for _, m in some]], axis=-1)[..., order]
        self._right = found & ~ignored
        self._wrong = ~found & ~ignored

    def precision(self, weights: np.ndarray, area: int) -> np.ndarray:
        """Average precision f64[R, T] of pictures that count weights f64[R, n] times.

        NaN where there are no objects.
        """
        objects = weights @ self.objects[:, area]
        values = np.zeros((len(weights), len(THRESHOLDS)))
        of_detection = weights[:, self._picture]
        for place in range(len(THRESHOLDS)):
            right = np.cumsum(of_detection * self._right[area, place], axis=1)
            wrong = np.cumsum(of_detection * self._wrong[area, place], axis=1)
            precision = right / (right + wrong + _SMALL)
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            # Each recall counts at the first detection that reaches it; one never reached, as 0.
            recall = right / np.maximum(objects, 1)[:, None]
            reached = np.searchsorted(_RECALLS, recall, side="right")
            here = np.diff(reached, axis=1, prepend=0)
            values[:, place] = (here * envelope).sum(axis=1) / len(_RECALLS)
        values[objects == 0] = np.nan
        return values

    def recall(self, weights: np.ndarray, area: int, most: int = MOST) -> np.ndarray:
        """Recall f64[R, T] with the `most` best detections of each picture; NaN without objects."""
        objects = weights @ self.objects[:, area]
        used = self._right[area][:, self._rank < most]
        right = weights[:, self._picture[self._rank < most]] @ used.T.astype(np.float64)
        return np.where(objects[:, None] > 0, right / np.maximum(objects[:, None], 1), np.nan)
