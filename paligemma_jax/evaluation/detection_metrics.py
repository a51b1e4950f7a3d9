"""Metrics of boxes and masks: COCO's average precision and recall, all-point average precision, the
overlap of paired masks, and referring segmentation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metric import (
    InvalidExample,
    Measure,
    Metric,
    Values,
    check_texts,
    divide,
)


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


THRESHOLDS = np.linspace(0.5, 0.95, 10)  # overlaps
MOST = 100  # detections of one image and label
# Objects of these areas in pixels count; others, and what finds them, are neither right nor wrong.
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


@dataclasses.dataclass(frozen=True)
class Matches:
    """Of one image and label: its detections by falling score, for each area and threshold."""

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
        for place, overlap in enumerate(overlaps):
            fitting = (free | crowd) & (overlap >= least)
            counting = fitting & ~aside[:, None]
            use = np.where(counting.any(axis=-1, keepdims=True), counting, fitting)
            worth = np.where(use, overlap, -1.0)
            taken = len(overlap) - 1 - np.argmax(worth[..., ::-1], axis=-1)
            hit = use.any(axis=-1)
            found[..., place] = hit
            ignored[..., place] = hit & aside[first, taken]
            free[first[hit], second[hit], taken[hit]] = False
    ignored |= ~found & outside[:, None]
    return Matches(scores, found, ignored, (~aside).sum(axis=1))


_RECALLS = np.linspace(0, 1, 101)


class LabelCurves:
    """Detections of one label in all images, by falling score; ties in the order of images."""

    def __init__(self, images: Sequence[Matches | None]):
        """One entry an image; None where it has neither objects nor detections of the label."""
        some = [(place, m) for place, m in enumerate(images) if m is not None]
        self.objects = np.zeros((len(images), len(some[0][1].objects)))  # that count, of each size
        for place, matches in some:
            self.objects[place] = matches.objects
        scores = np.concatenate([m.scores for _, m in some])
        order = np.argsort(-scores, kind="stable")
        self._image = np.repeat([p for p, _ in some], [len(m.scores) for _, m in some])[order]
        self._rank = np.concatenate([np.arange(len(m.scores)) for _, m in some])[order]
        found = np.concatenate([m.found for _, m in some], axis=-1)[..., order]
        counted = ~np.concatenate([m.ignored for _, m in some], axis=-1)[..., order]
        self._right, self._wrong = found & counted, ~found & counted

    def curve(
        self, weights: np.ndarray, area: int, threshold: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Recall and best precision at that recall or beyond f64[R, D], and objects f64[R].

        Images count weights f64[R, n] times.
        """
        objects, counts = weights @ self.objects[:, area], weights[:, self._image]
        right = np.cumsum(counts * self._right[area, threshold], axis=1)
        wrong = np.cumsum(counts * self._wrong[area, threshold], axis=1)
        precision = divide(right, right + wrong, 0.0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        return right / np.maximum(objects, 1)[:, None], envelope, objects

    def precision(self, weights: np.ndarray, area: int) -> np.ndarray:
        """COCO's average precision f64[R, T]; NaN where there are no objects."""
        values = np.full((len(weights), len(THRESHOLDS)), np.nan)
        for place in range(len(THRESHOLDS)):
            recall, envelope, objects = self.curve(weights, area, place)
            # Each recall counts at the first detection that reaches it; one never reached, as 0.
            reached = np.searchsorted(_RECALLS, recall, side="right")
            here = np.diff(reached, axis=1, prepend=0)
            area_below = (here * envelope).sum(axis=1) / len(_RECALLS)
            values[:, place] = np.where(objects > 0, area_below, np.nan)
        return values

    def recall(self, weights: np.ndarray, area: int, most: int = MOST) -> np.ndarray:
        """Recall f64[R, T] with the `most` best detections of each image; NaN without objects."""
        objects = weights @ self.objects[:, area]
        used = self._right[area][:, self._rank < most]
        right = weights[:, self._image[self._rank < most]] @ used.T.astype(np.float64)
        return np.where(objects[:, None] > 0, right / np.maximum(objects[:, None], 1), np.nan)


@dataclasses.dataclass(frozen=True)
class FoundBoxes:
    """All boxes found in one image: xyxy [n, 4] in pixels, a label and a score of each.

    `scores` may be None where the metric does not use them.
    """

    xyxy: Any
    labels: Sequence[str]
    scores: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class TrueBoxes:
    """All objects of one image: xyxy [n, 4] in pixels, and a label of each.

    `crowd` marks boxes around many objects, which may be found any number of times or not at all.
    `areas` in pixels, by which COCO tells small objects from large ones, are those of the boxes
    where they are not given (COCO gives those of the masks).
    """

    xyxy: Any
    labels: Sequence[str]
    crowd: Sequence[bool] | None = None
    areas: Sequence[float] | None = None


_Boxes = tuple[np.ndarray, np.ndarray]  # of one image, checked: f64[n, 4] and labels object[n]


def _read_boxes(prediction: Any, reference: Any, scored: bool) -> tuple[_Boxes, np.ndarray, _Boxes]:
    """The found boxes, their scores (ones unless `scored`), and the true boxes."""
    if not isinstance(prediction, FoundBoxes) or not isinstance(reference, TrueBoxes):
        got = f"{type(prediction).__name__} and {type(reference).__name__}"
        raise InvalidExample(f"expected FoundBoxes and TrueBoxes, got {got}")
    found = _checked(prediction.xyxy, prediction.labels, "prediction")
    count = len(found[0])
    if scored and prediction.scores is None and count:
        raise InvalidExample("the boxes have no scores (without: BoxDetection(scored=False))")
    scores = (
        _numbers(() if prediction.scores is None else prediction.scores, (count,), "scores")
        if scored
        else np.ones(count)
    )
    return found, scores, _checked(reference.xyxy, reference.labels, "reference")


def _checked(xyxy: Any, labels: Any, what: str) -> _Boxes:
    names = check_texts(labels, "label") if len(labels) else []
    boxes = _numbers(xyxy, (len(names), 4), f"boxes of the {what}")
    wrong = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if wrong.any():
        got = boxes[wrong][0].tolist()
        raise InvalidExample(f"expected x1 <= x2, y1 <= y2 of the {what}, got {got}")
    return boxes, np.array(names, object)


def _numbers(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Finite numbers f64 of this shape."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise InvalidExample(f"the {what} are not numbers") from e
    array = array.reshape(shape) if array.size == 0 and 0 in shape else array
    if array.shape != shape:
        got = list(array.shape)
        raise InvalidExample(f"expected {what} {list(shape)}, one for each label, got {got}")
    if not np.isfinite(array).all():
        raise InvalidExample(f"the {what} are not all finite")
    return array


@dataclasses.dataclass(eq=False)
class BoxDetection(Metric):
    """COCO's scores in 0..1, each a mean over labels that have objects.

    `AP`: area under the precision-recall curve (the highest precision at 101 recalls 0, 0.01, ...
    or beyond), mean over overlaps 0.5, 0.55, ... 0.95; `AP50` and `AP75` at one overlap; `APs`,
    `APm`, `APl` of objects below 32^2, between, and above 96^2 pixels. `AR1`, `AR10`, `AR100`:
    recall with as many detections an image and label, mean over overlaps; `ARs`, `ARm`, `ARl` by
    size with 100. Scores of sizes that no object has are not reported. `precision@50`, `recall@50`
    and `f1@50` are of all boxes together at overlap 0.5, whatever their scores.

    Detections are ranked by score. PaliGemma gives none of its own: this library makes one of the
    probabilities of the tokens. `scored=False` gives all the same score; then images are ranked
    by id and boxes as they were written, so that AP depends on that order. A prediction is
    `FoundBoxes`, a reference `TrueBoxes`. Source: Lin et al. 2014, Microsoft COCO; equal to
    pycocotools.
    """

    scored: bool = True
    expected = (
        "FoundBoxes(xyxy, labels, scores) and TrueBoxes(xyxy, labels): x1 <= x2, y1 <= y2, in "
        "pixels, one label and score a box"
    )

    def _keep(self, prediction: Any, reference: Any) -> dict[str, Matches]:
        (boxes, labels), scores, (truths, names) = _read_boxes(prediction, reference, self.scored)
        areas, crowd = box_areas(truths), np.zeros(len(truths), bool)
        if reference.areas is not None:
            areas = _numbers(reference.areas, areas.shape, "areas")
        if reference.crowd is not None:
            crowd = _numbers(reference.crowd, areas.shape, "crowd marks") > 0
        matches = {}
        for label in sorted({*labels, *names}):
            mine, right = labels == label, names == label
            matches[str(label)] = match(
                boxes[mine], scores[mine], truths[right], areas[right], crowd[right]
            )
        return matches

    def _measure(self, kept: Sequence[Mapping[str, Matches]]) -> Measure:
        labels = sorted({label for one in kept for label in one})
        all_curves = [LabelCurves([one.get(label) for one in kept]) for label in labels]
        counts = np.array([_counts_at_half(one) for one in kept])

        def measure(weights: np.ndarray) -> Values:
            values: Values = {}
            for place, area in enumerate(AREAS):
                curves = [curve for curve in all_curves if curve.objects[:, place].any()]
                if not curves:
                    continue
                precisions = _mean([c.precision(weights, place) for c in curves])  # f64[R, T]
                values[f"AP{area}"] = precisions.mean(axis=1)
                if not area:
                    values["AP50"] = precisions[:, 0]
                    values["AP75"] = precisions[:, 5]
                for most in (MOST,) if area else (1, 10, MOST):
                    recalls = _mean([c.recall(weights, place, most) for c in curves])
                    values[f"AR{area or most}"] = recalls.mean(axis=1)
            right, wrong, objects = (weights @ counts).T
            precision, recall = divide(right, right + wrong, 0.0), divide(right, objects, 0.0)
            f1 = divide(2 * precision * recall, precision + recall, 0.0)
            return values | {"precision@50": precision, "recall@50": recall, "f1@50": f1}

        return measure

    def _example_scores(self, kept: Sequence[Mapping[str, Matches]]) -> np.ndarray:
        return _f1_of_images(kept)


def _f1_of_images(kept: Sequence[Mapping[str, Matches]]) -> np.ndarray:
    """F1 at the first overlap; 1 where there is nothing and nothing was found."""
    right, wrong, objects = np.array([_counts_at_half(one) for one in kept]).T
    return divide(2 * right, right + wrong + objects, 1.0)


def _counts_at_half(one: Mapping[str, Matches]) -> tuple[float, float, float]:
    """Right and wrong detections at overlap 0.5 of any size, and objects."""
    found = [(m.found[0, 0] & ~m.ignored[0, 0]).sum() for m in one.values()]
    wrong = [(~m.found[0, 0] & ~m.ignored[0, 0]).sum() for m in one.values()]
    return float(sum(found)), float(sum(wrong)), float(sum(m.objects[0] for m in one.values()))


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Over labels, but those that a sample has no objects of."""
    stacked = np.array(values)
    present = ~np.isnan(stacked)
    return divide(np.nansum(stacked, axis=0), present.sum(axis=0))


@dataclasses.dataclass(eq=False)
class AllPointPrecision(Metric):
    """`ap` in 0..1: mean over classes of the area under the whole precision-recall curve.

    The precision at a recall is the best one at this recall or a higher one. Boxes are ranked by
    score over all images. In each image the best box chooses first: it is right if the object
    of its label that it overlaps most does so by at least `iou` and is not taken yet. Classes
    without objects do not count. With `last_word` a class is the last word of its labels ("red
    circle" and "blue circle" are both of "circle"); boxes are compared by the whole label all the
    same. A prediction is `FoundBoxes`, a reference `TrueBoxes` (crowds and areas are not looked
    at). Source: Everingham et al. 2010, The Pascal VOC Challenge, as it was from 2010 on.
    """

    iou: float = 0.5
    last_word: bool = False
    expected = "FoundBoxes(xyxy, labels, scores) and TrueBoxes(xyxy, labels)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, Matches]:
        (boxes, labels), scores, (truths, names) = _read_boxes(prediction, reference, scored=True)
        classes: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {}
        for label in sorted({*labels, *names}):
            mine, right = labels == label, truths[names == label]
            hits = _hits(boxes[mine], scores[mine], right, self.iou)
            name = label.split()[-1] if self.last_word and label.split() else label
            classes.setdefault(name, []).append((scores[mine], hits, len(right)))
        matches = {}
        for name, parts in classes.items():
            scores, hits, objects = zip(*parts, strict=True)
            found = np.concatenate(hits)[None, None]
            matches[name] = Matches(
                np.concatenate(scores), found, np.zeros_like(found), np.array([sum(objects)])
            )
        return matches

    def _measure(self, kept: Sequence[Mapping[str, Matches]]) -> Measure:
        names = sorted({name for one in kept for name, m in one.items() if m.objects[0]})
        curves = [LabelCurves([one.get(name) for one in kept]) for name in names]

        def area(curve: LabelCurves, weights: np.ndarray) -> np.ndarray:
            recall, envelope, objects = curve.curve(weights, 0, 0)
            below = np.sum(np.diff(recall, prepend=0.0, axis=1) * envelope, axis=1)
            return np.where(objects > 0, below, np.nan)

        return lambda weights: {
            "ap": _mean([area(c, weights) for c in curves] or [np.full(len(weights), np.nan)])
        }

    def _example_scores(self, kept: Sequence[Mapping[str, Matches]]) -> np.ndarray:
        return _f1_of_images(kept)


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


@dataclasses.dataclass(eq=False)
class MaskPairs(Metric):
    """`miou` in 0..1: mean intersection over union of masks paired with objects, best first.

    A prediction is bool[n, H, W], a reference bool[m, H, W]; an image counts max(n, m) times, as
    what has no partner, on either side, counts 0. Images without any do not count.
    """

    main = "miou"
    expected = "masks bool[n, H, W] and the right ones bool[m, H, W]"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        found, right = np.asarray(prediction), np.asarray(reference)
        if found.ndim != 3 or right.ndim != 3 or found.shape[1:] != right.shape[1:]:
            got = f"{list(found.shape)} and {list(right.shape)}"
            raise InvalidExample(f"expected masks [n, H, W] of one height and width, got {got}")
        overlaps = paired_overlaps(found, right)
        return {"overlap": float(np.sum(overlaps)), "objects": float(len(overlaps))}

    def _summarize(self, sums: Values, means: Values) -> Values:
        return {"miou": divide(sums["overlap"], sums["objects"])}

    def _example_scores(self, kept: Sequence[Any]) -> np.ndarray:
        return np.nan_to_num(super()._example_scores(kept), nan=1.0)


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


_MASK_LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9)
_BOX_LIMITS = (0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class ObjectMask:
    """A mask bool[H, W] at the image's own size, and the box x1, y1, x2, y2 around it.

    Boxes of prediction and reference are in the same unit: pixels, or fractions of the image.
    """

    mask: np.ndarray
    box: tuple[float, float, float, float]


@dataclasses.dataclass(eq=False)
class ReferringSegmentation(Metric):
    """Scores in 0..1 of one mask an expression; a prediction of None, an invalid answer, counts 0.

    `miou`: mean over expressions of shared by joint pixels, by which PaliGemma is reported.
    `ciou`: all shared pixels by all joint ones, also called oIoU, which favors large objects.
    `precision/0.5` to `/0.9`: fraction of masks with an overlap above that. `boxacc/0.5` and
    `/0.75`: fraction of boxes with an overlap of at least that. `invalid`: fraction of predictions
    that are None. A prediction is an `ObjectMask` or None, a reference an `ObjectMask`, both masks
    of one size. Sources: Kazemzadeh et al. 2014 and Yu et al. 2016, RefCOCO, RefCOCO+; Mao et al.
    2016, RefCOCOg; Steiner et al. 2024 and big_vision for what is reported.
    """

    expected = "an ObjectMask(bool[H, W], box) or None, and an ObjectMask of the same size"
    main = "miou"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        right = _checked_mask(reference, "reference")
        if not right.mask.any():
            raise InvalidExample("the mask of the reference is empty")
        if prediction is None:
            shared, joint, box = 0, int(right.mask.sum()), 0.0
        else:
            found = _checked_mask(prediction, "prediction")
            if found.mask.shape != right.mask.shape:
                got = f"{found.mask.shape} and {right.mask.shape}"
                raise InvalidExample(f"expected masks of one size, got {got}")
            shared = int((found.mask & right.mask).sum())
            joint = int(found.mask.sum() + right.mask.sum()) - shared
            box = float(box_overlaps(np.array([found.box]), np.array([right.box]))[0, 0])
        iou = shared / joint
        return {
            "miou": iou,
            "shared": float(shared),
            "joint": float(joint),
            **{f"precision/{limit}": float(iou > limit) for limit in _MASK_LIMITS},
            **{f"boxacc/{limit}": float(box >= limit) for limit in _BOX_LIMITS},
            "invalid": float(prediction is None),
        }

    def _summarize(self, sums: Values, means: Values) -> Values:
        ciou = {"ciou": divide(sums["shared"], sums["joint"])}
        return {k: v for k, v in means.items() if k not in ("shared", "joint")} | ciou


def _checked_mask(value: Any, what: str) -> ObjectMask:
    if not isinstance(value, ObjectMask):
        raise InvalidExample(f"expected the {what} to be an ObjectMask, got {type(value).__name__}")
    mask = value.mask
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or not mask.size:
        got = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
        raise InvalidExample(f"expected the mask of the {what} to be bool[H, W], got {got}")
    box = _numbers(value.box, (4,), "box")
    if (box[2:] < box[:2]).any():
        raise InvalidExample(f"expected x1 <= x2, y1 <= y2 of the {what}, got {value.box}")
    return value
