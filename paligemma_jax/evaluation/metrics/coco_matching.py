"""Which detections of one picture and label find an object, by COCO's rule."""

import dataclasses

import numpy as np

from paligemma_jax.evaluation.metrics.box_overlap import box_areas, box_overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # overlaps
MOST = 100  # detections of one picture and label
# Objects of these areas in pixels count; others, and what finds them, are neither right nor wrong.
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


@dataclasses.dataclass(frozen=True)
class Matches:
    """Of one picture and label: its detections by falling score, for each area and threshold."""

    scores: np.ndarray  # f64[D]
    found: np.ndarray  # bool[A, T, D]: it finds an object
    ignored: np.ndarray  # bool[A, T, D]: it does not count
    objects: np.ndarray  # i64[A]: how many objects count


def match(
    boxes: np.ndarray, scores: np.ndarray, truths: np.ndarray, areas: np.ndarray, crowd: np.ndarray
) -> Matches:
    """Detections f64[D, 4] with scores f64[D]; objects f64[G, 4] of areas f64[G], crowd bool[G].

    The best detection chooses first. It takes the object that it overlaps most, of those with at
    least the threshold that are still free; one that does not count only if no other is left. A
    crowd can be taken by many. What takes an object that does not count, does not count; nor does
    what takes none and is itself of another size. Of equal overlaps the last one is taken.
    """
    order = np.argsort(-scores, kind="mergesort")[:MOST]
    boxes, scores = boxes[order], scores[order]
    limits = np.array(list(AREAS.values()), np.float64)
    aside = crowd[None] | (areas < limits[:, :1]) | (areas > limits[:, 1:])  # bool[A, G]
    own = box_areas(boxes)
    outside = (own < limits[:, :1]) | (own > limits[:, 1:])  # bool[A, D]
    shape = (len(AREAS), len(THRESHOLDS), len(boxes))
    found, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    if len(truths):
        overlaps = box_overlaps(boxes, truths, crowd)
        least = np.minimum(THRESHOLDS, 1 - 1e-10)[None, :, None]
        free = np.ones((len(AREAS), len(THRESHOLDS), len(truths)), bool)
        first, second = np.indices(shape[:2])
        for place, row in enumerate(overlaps):
            fitting = (free | crowd) & (row >= least)
            counting = fitting & ~aside[:, None]
            use = np.where(counting.any(axis=-1, keepdims=True), counting, fitting)
            worth = np.where(use, row, -1.0)
            taken = len(row) - 1 - np.argmax(worth[..., ::-1], axis=-1)
            hit = use.any(axis=-1)
            found[..., place] = hit
            ignored[..., place] = hit & aside[first, taken]
            free[first[hit], second[hit], taken[hit]] = False
    ignored |= ~found & outside[:, None]
    return Matches(scores, found, ignored, (~aside).sum(axis=1))
