"""Mean average precision of scored boxes at one overlap, all-point interpolated (VOC 2010)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paligemma_jax.processing.overlaps import intersection_over_union
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
        overlaps = intersection_over_union([prediction.box], candidates)[0]
        best = int(np.argmax(overlaps)) if overlaps.size else -1
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
