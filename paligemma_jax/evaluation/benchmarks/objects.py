"""Boxes and masks of benchmarks: the right ones from a line, the found ones from an answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.evaluation.benchmarks.benchmark import Row
from paligemma_jax.evaluation.metrics.coco_detection import FoundBoxes, TrueBoxes
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.evaluation.metrics.referring_segmentation import ObjectMask
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.mask_source import load_mask, mask_from_coco
from paligemma_jax.processing.masks import tight_corners
from paligemma_jax.processing.parsing import parse_answer
from paligemma_jax.processing.segmentations import Segmentations


def true_boxes(row: Row) -> TrueBoxes:
    """Of the field objects: a list of label, box (x1, y1, x2, y2 in pixels), and crowd and area."""
    objects = row.get("objects")
    if not isinstance(objects, Sequence) or isinstance(objects, str):
        raise Misfit("the field 'objects' is no list of objects with label and box")
    if not all(isinstance(one, Mapping) and {"label", "box"} <= one.keys() for one in objects):
        raise Misfit("an object lacks its label or its box")
    areas = [one.get("area") for one in objects]
    return TrueBoxes(
        [one["box"] for one in objects],
        [one["label"] for one in objects],
        [bool(one.get("crowd")) for one in objects],
        None if None in areas else areas,
    )


def found_boxes(objects: Sequence[Mapping[str, Any]]) -> FoundBoxes:
    """Of objects as predictions keep them: label, box and score."""
    return FoundBoxes(
        [one["box"] for one in objects],
        [one["label"] for one in objects],
        [one["score"] for one in objects],
    )


def true_mask(row: Row, folder: Path) -> ObjectMask:
    """Of the field mask (a file beside the pictures), or segmentation (COCO's) and size.

    The box is that of the field box (x1, y1, x2, y2 in pixels), or the one around the mask; it is
    kept as parts of the picture.
    """
    try:
        if "mask" in row:
            mask = load_mask(folder / str(row["mask"]))
        elif "segmentation" in row and "size" in row:
            height, width = row["size"]
            mask = mask_from_coco(row["segmentation"], height, width)
        else:
            raise Misfit("neither 'mask' nor 'segmentation' with 'size' [height, width] is there")
        y1, x1, y2, x2 = tight_corners(mask)
    except (PaliGemmaError, TypeError, ValueError) as e:
        raise Misfit(f"the mask cannot be read: {e}") from e
    if "box" not in row:
        return ObjectMask(mask, (x1, y1, x2, y2))
    try:
        left, top, right, bottom = (float(value) for value in row["box"])
    except (TypeError, ValueError) as e:
        raise Misfit(f"the box {row['box']!r} is not x1, y1, x2, y2") from e
    height, width = mask.shape
    return ObjectMask(mask, (left / width, top / height, right / width, bottom / height))


def found_mask(text: str, codec: MaskCodec, height: int, width: int) -> ObjectMask | None:
    """The first object with a mask in an answer, in a picture of height x width pixels.

    As big_vision's evaluator: corners are cut to whole pixels, the decoded 64 x 64 crop is resized
    bilinearly and cut at half. None for an answer without a mask, or with a box without pixels.
    """
    box = next((one for one in parse_answer(text).objects if one.codes), None)
    if box is None:
        return None
    x1, x2 = int(box.x1 * width), int(box.x2 * width)
    y1, y2 = int(box.y1 * height), int(box.y2 * height)
    if x2 <= x1 or y2 <= y1:
        return None
    crop = codec.decode(np.array([box.codes]))[0]
    resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = np.asarray(resized) > 0.5
    return ObjectMask(mask, (box.x1, box.y1, box.x2, box.y2))


def found_masks(text: str, codec: MaskCodec, height: int, width: int) -> np.ndarray:
    """bool[n, height, width] of all objects in an answer, empty for one with a box alone."""
    return Segmentations.decoded(parse_answer(text), width, height, codec.decode).masks
