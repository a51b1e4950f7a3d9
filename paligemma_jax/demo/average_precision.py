"""Mean average precision of scored boxes at one overlap, all-point interpolated (VOC 2010)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paligemma_jax.processing.parsing import Box


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A box found in picture number `picture`, with a score in 0..1."""

    picture: int
    box: Box
    score: float


def mean_average_precision(
    truths: Mapping[str, Mapping[int, Sequence[Box]]],
    found: Mapping[str, Sequence[Prediction]],
    iou: float,
) -> float:
    """Mean over classes of the average precision, in 0..1; classes without truth are left out."""
    values = [
        average_precision(boxes, found.get(name, ()), iou)
        for name, boxes in truths.items()
        if any(boxes.values())
    ]
    return float(np.mean(values))


def average_precision(
    truths: Mapping[int, Sequence[Box]], found: Sequence[Prediction], iou: float
) -> float:
    """Area under the precision-recall curve; each true box can be found once, best scores first."""
    total = sum(map(len, truths.values()))
    taken: set[tuple[int, int]] = set()
    hits = []
    for prediction in sorted(found, key=lambda p: -p.score):
        candidates = truths.get(prediction.picture, ())
        overlaps = [intersection_over_union(prediction.box, box) for box in candidates]
        best = int(np.argmax(overlaps)) if overlaps else -1
        hit = best >= 0 and overlaps[best] >= iou and (prediction.picture, best) not in taken
        if hit:
            taken.add((prediction.picture, best))
        hits.append(hit)
    if not hits:
        return 0.0
    true = np.cumsum(hits)
    precision = true / np.arange(1, len(hits) + 1)
    recall = true / total
    # The best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def intersection_over_union(a: Box, b: Box) -> float:
    """Shared area over joint area of two boxes, in 0..1."""
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    shared = max(0.0, height) * max(0.0, width)
    joint = (a.y2 - a.y1) * (a.x2 - a.x1) + (b.y2 - b.y1) * (b.x2 - b.x1) - shared
    return shared / joint if joint > 0 else 0.0
