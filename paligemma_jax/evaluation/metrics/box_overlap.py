"""How much boxes overlap."""

import numpy as np


def box_overlaps(
    boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None
) -> np.ndarray:
    """f64[n, m] in 0..1 of boxes f64[n, 4] and f64[m, 4], both x1, y1, x2, y2 in one unit.

    Shared area by joint area, 0 for boxes without area. Where `crowd` bool[m] is true the shared
    area is taken by that of the first box alone, as COCO does.
    """
    boxes, others = (np.asarray(b, np.float64).reshape(-1, 4) for b in (boxes, others))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    own, other = box_areas(boxes)[:, None], box_areas(others)[None]
    joint = own + other - shared
    if crowd is not None:
        joint = np.where(crowd[None], own, joint)
    return np.where(joint > 0, shared / np.where(joint > 0, joint, 1), 0.0)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """f64[n] of boxes f64[n, 4], x1, y1, x2, y2."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=-1)
