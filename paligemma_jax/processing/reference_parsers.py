"""Answers parsed exactly as supervision, the demo Space and big_vision's evaluator parse them.

For results that must equal theirs. They drop what they do not understand; `parse_answer` does not.
Sources: supervision 0.31.2 `from_vlm(VLM.PALIGEMMA)`; huggingface.co/spaces/big-vision/paligemma
`extract_objs`; big_vision `evaluators/proj/paligemma/transfers/segmentation.py`.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from paligemma_jax.errors import InvalidImageError

_LOCATION = r"<loc(\d{4})>"
_SUPERVISION = re.compile(rf"(?<!<loc\d{{4}}>){_LOCATION * 4} ([\w\s\-]+)")
_CODE = r"<seg(\d{3})>"
_SPACE = re.compile(rf"(.*?){_LOCATION * 4}\s*(?:{_CODE * 16})?\s*([^;<>]+)? ?(?:; )?")
_OBJECT_TOKENS = 20  # four locations and 16 codes


@dataclasses.dataclass(frozen=True, eq=False)
class SupervisionBoxes:
    """xyxy f64[n, 4] in pixels, class_id i64[n] or None, class_name str[n]."""

    xyxy: np.ndarray
    class_id: np.ndarray | None
    class_name: np.ndarray


def parse_supervision(
    text: str, width: int, height: int, classes: Sequence[str] | None = None
) -> SupervisionBoxes:
    """What `supervision.Detections.from_vlm` finds: locations / 1024, no masks.

    Corners out of order are swapped. A label is one space and then letters, digits,
    spaces, `_` and `-`: it is cut at anything else, and without one the box is not found. `classes`
    drops other labels and gives the rest numbers. Raises InvalidImageError for a size that is not
    positive.
    """
    if not (width > 0 and height > 0):
        raise InvalidImageError(
            f"Expected an image of positive size, got {width} x {height}. Pass *image.size"
        )
    found = _SUPERVISION.findall(text)
    if not found:
        return SupervisionBoxes(np.empty((0, 4)), np.empty(0, int), np.empty(0, str))
    corners = np.array([[int(value) for value in match[:4]] for match in found])
    corners = corners[:, [1, 0, 3, 2]] / 1024 * np.array([width, height, width, height])
    xyxy = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    names = np.array([match[4].strip() for match in found])
    if classes is None:
        return SupervisionBoxes(xyxy, None, names)
    kept = np.array([name in classes for name in names], bool)
    numbers = [list(classes).index(name) for name in names[kept]]
    return SupervisionBoxes(xyxy[kept], np.array(numbers, int), names[kept])


@dataclasses.dataclass(frozen=True)
class SpacePart:
    """A stretch of an answer; other text than objects has `content` alone.

    xyxy are whole pixels; `name` keeps the space before a separator; codes are 16 or None.
    """

    content: str
    xyxy: tuple[int, int, int, int] | None = None
    codes: tuple[int, ...] | None = None
    name: str | None = None


def parse_space(
    text: str, width: int, height: int, *, unique_labels: bool = False
) -> list[SpacePart]:
    """What the demo Space's `extract_objs` finds: locations / 1024, rounded to pixels.

    `unique_labels` appends ' to a name until it is new. Masks are `paste_space` of decoded codes.
    """
    parts: list[SpacePart] = []
    used: set[str | None] = set()
    while text:
        match = _SPACE.match(text)
        if match is None:
            break
        before, name = match[1], match[22]
        y1, x1, y2, x2 = (int(value) / 1024 for value in match.groups()[1:5])
        xyxy = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
        codes = None if match[6] is None else tuple(int(code) for code in match.groups()[5:21])
        if before:
            parts.append(SpacePart(before))
        while unique_labels and name in used:
            name = (name or "") + "'"
        used.add(name)
        parts.append(SpacePart(match[0][len(before) :], xyxy, codes, name))
        text = text[match.end() :]
    return [*parts, SpacePart(text)] if text else parts


def paste_space(
    mask: np.ndarray, xyxy: tuple[int, int, int, int], height: int, width: int
) -> np.ndarray:
    """The Space's soft mask f64[height, width] of a decoded one f32[64, 64] in 0..1."""
    x1, y1, x2, y2 = xyxy
    pasted = np.zeros((height, width))
    if y2 > y1 and x2 > x1:
        # Pillow's default for "L", as there: bicubic.
        small = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
        pasted[y1:y2, x1:x2] = np.array(small.resize((x2 - x1, y2 - y1))) / 255.0
    return pasted


@dataclasses.dataclass(frozen=True)
class BigVisionObject:
    """Corners y1, x1, y2, x2 in 0..1 and 16 codes; all zero where the answer is not valid."""

    corners: tuple[float, ...]
    codes: tuple[int, ...]
    valid: bool


def parse_big_vision(tokens: Sequence[int], loc_start: int, seg_start: int) -> BigVisionObject:
    """What big_vision's segmentation evaluator takes from an answer: its first 20 tokens.

    They are valid if four are locations (/ 1023) with y1 < y2 and x1 < x2, and 16 mask codes; the
    rest of the answer is ignored.
    """
    locations = [token - loc_start for token in tokens[:4]]
    codes = [token - seg_start for token in tokens[4:_OBJECT_TOKENS]]
    valid = (
        len(tokens) >= _OBJECT_TOKENS
        and all(0 <= location < 1024 for location in locations)
        and all(0 <= code < 128 for code in codes)
        and locations[2] > locations[0]
        and locations[3] > locations[1]
    )
    if not valid:
        return BigVisionObject((0.0,) * 4, (0,) * 16, False)
    return BigVisionObject(tuple(value / 1023 for value in locations), tuple(codes), True)


def paste_big_vision(
    mask: np.ndarray, corners: Sequence[float], height: int, width: int
) -> np.ndarray:
    """The evaluator's bool[height, width] of a decoded mask f32[64, 64] in -1..1, not clipped.

    Pixels of the box are cut off, not rounded; the mask is resized bilinearly and is where it
    is above 0.
    """
    y1, x1, y2, x2 = (
        int(corner * side)
        for corner, side in zip(corners, (height, width, height, width), strict=True)
    )
    pasted = np.zeros((height, width), bool)
    if y2 > y1 and x2 > x1:
        small = Image.fromarray(np.asarray(mask, np.float32))
        resized = small.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        pasted[y1:y2, x1:x2] = np.asarray(resized) > 0
    return pasted
