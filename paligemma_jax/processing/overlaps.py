"""How much boxes overlap, and which of those that are alike to keep."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.processing.parsing import Box


def intersection_over_union(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """f64[n, m]: shared area over joint area of each pair, in 0..1; 0 for boxes without area."""
    first, second = _corners(boxes)[:, None], _corners(others)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (first, second)]
    joint = areas[0] + areas[1] - shared
    return np.where(joint > 0, shared / np.where(joint > 0, joint, 1), 0.0)


def distinct(boxes: Sequence[Box], scores: Sequence[float], iou: float) -> list[int]:
    """Places of the boxes to keep, in their order; see `Detections.without_duplicates`."""
    overlaps = intersection_over_union(boxes, boxes)
    corners = _corners(boxes)
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # ties: the first
        rivals = [other for other in kept if boxes[other].label == boxes[place].label]
        equal = (corners[rivals] == corners[place]).all(axis=1).any()
        if not equal and not (overlaps[place, rivals] >= iou).any():
            kept.append(place)
    return sorted(kept)


def _corners(boxes: Sequence[Box]) -> np.ndarray:
    corners = [(box.y1, box.x1, box.y2, box.x2) for box in boxes]
    return np.array(corners, np.float64).reshape(-1, 4)
