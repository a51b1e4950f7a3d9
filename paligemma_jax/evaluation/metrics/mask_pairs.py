"""How well several masks of one picture fit, whichever order they come in."""

from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator


class MaskPairs(TotalsAccumulator):
    """`miou` in 0..1: mean intersection over union of masks paired with objects, best first.

    A prediction is bool[n, H, W], a reference bool[m, H, W]; a picture counts max(n, m) times, as
    what has no partner, on either side, counts 0. Pictures without any do not count.
    """

    main = "mean"
    fits = "Masks bool[n, H, W] and the right ones bool[m, H, W] fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        found, right = np.asarray(prediction), np.asarray(reference)
        if found.ndim != 3 or right.ndim != 3 or found.shape[1:] != right.shape[1:]:
            raise Misfit(
                f"the masks are {list(found.shape)} and {list(right.shape)}, not [n, H, W] of one "
                "height and width"
            )
        overlaps = paired_overlaps(found, right)
        total, count = float(np.sum(overlaps)), float(len(overlaps))
        return {"overlap": total, "objects": count, "mean": total / count if count else 1.0}

    def _finish(self, totals: Totals) -> Values:
        return {"miou": totals.ratio("overlap", "objects")}


def paired_overlaps(found: np.ndarray, right: np.ndarray) -> list[float]:
    """IoU of each pair of masks bool[n, H, W] and bool[m, H, W], best first; max(n, m) numbers."""
    shared = np.einsum("nhw,mhw->nm", found.astype(np.float32), right.astype(np.float32))
    areas = found.sum(axis=(1, 2))[:, None] + right.sum(axis=(1, 2))[None]
    iou = shared / np.maximum(areas - shared, 1)
    overlaps = []
    for _ in range(min(iou.shape)):
        n, m = np.unravel_index(int(np.argmax(iou)), iou.shape)
        overlaps.append(max(0.0, float(iou[n, m])))
        iou[n, :] = iou[:, m] = -1
    return overlaps + [0.0] * (max(len(found), len(right)) - len(overlaps))
