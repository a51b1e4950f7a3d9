"""The one object that an expression means: its mask and its box."""

import dataclasses
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.box_overlap import box_overlaps
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator

_MASK_LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9)
_BOX_LIMITS = (0.5, 0.75)

Corners = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ObjectMask:
    """A mask bool[H, W] at the picture's own size, and the box x1, y1, x2, y2 around it.

    Boxes of prediction and reference are in the same unit: pixels, or parts of the picture.
    """

    mask: np.ndarray
    box: Corners


class ReferringSegmentation(TotalsAccumulator):
    """Figures in 0..1 of one mask an expression; a prediction of None, an invalid answer, counts 0.

    `miou`: mean over expressions of shared by joint pixels, by which PaliGemma is reported.
    `ciou`: all shared pixels by all joint ones, also called oIoU, which favours large objects.
    `precision/0.5` to `/0.9`: share of masks with an overlap above that. `boxacc/0.5` and `/0.75`:
    share of boxes with an overlap of at least that. `invalid`: share of predictions that are None.
    A prediction is an `ObjectMask` or None, a reference an `ObjectMask`, both masks of one size.
    Sources: Kazemzadeh et al. 2014 and Yu et al. 2016, RefCOCO, RefCOCO+; Mao et al. 2016,
    RefCOCOg; Steiner et al. 2024 and big_vision for what is reported.
    """

    fits = "An ObjectMask(bool[H, W], box) or None, and an ObjectMask of the same size, fit."
    main = "iou"

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        right = _check(reference, "reference")
        if not right.mask.any():
            raise Misfit("the mask of the reference is empty")
        if prediction is None:
            shared, joint, box = 0, int(right.mask.sum()), 0.0
        else:
            found = _check(prediction, "prediction")
            if found.mask.shape != right.mask.shape:
                raise Misfit(
                    f"the masks are of {found.mask.shape[0]} x {found.mask.shape[1]} and "
                    f"{right.mask.shape[0]} x {right.mask.shape[1]} pixels"
                )
            shared = int((found.mask & right.mask).sum())
            joint = int(found.mask.sum() + right.mask.sum()) - shared
            box = float(box_overlaps(np.array([found.box]), np.array([right.box]))[0, 0])
        iou = shared / joint
        return {
            "shared": float(shared),
            "joint": float(joint),
            "iou": iou,
            "invalid": float(prediction is None),
            **{f"precision/{limit}": float(iou > limit) for limit in _MASK_LIMITS},
            **{f"boxacc/{limit}": float(box >= limit) for limit in _BOX_LIMITS},
        }

    def _finish(self, totals: Totals) -> Values:
        names = [f"precision/{limit}" for limit in _MASK_LIMITS]
        names += [f"boxacc/{limit}" for limit in _BOX_LIMITS]
        return {
            "miou": totals.mean("iou"),
            "ciou": totals.ratio("shared", "joint"),
            **{name: totals.mean(name) for name in [*names, "invalid"]},
        }


def referring_segmentation(
    predictions: Examples[ObjectMask | None],
    references: Examples[ObjectMask],
) -> dict[str, float]:
    """`ReferringSegmentation` of lists or mappings; raises DatasetError."""
    return ReferringSegmentation().add_all(predictions, references).result()


def _check(value: Any, what: str) -> ObjectMask:
    if not isinstance(value, ObjectMask):
        raise Misfit(f"the {what} is of type {type(value).__name__}, not ObjectMask")
    mask = value.mask
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or not mask.size:
        kind = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
        raise Misfit(f"the mask of the {what} is {kind}, not bool[H, W]")
    box = np.asarray(value.box, np.float64)
    if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < box[:2]).any():
        raise Misfit(f"the box of the {what}, {value.box}, is not x1 <= x2, y1 <= y2")
    return value
