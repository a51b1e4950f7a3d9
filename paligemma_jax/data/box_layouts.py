"""The orders and units that data sets write boxes in."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from paligemma_jax.errors import DatasetError

Corners = tuple[float, float, float, float]  # y1, x1, y2, x2 as fractions of the picture


@runtime_checkable
class BoxLayout(Protocol):
    """Four numbers of a box in a picture of width x height pixels -> its corners."""

    def corners(self, numbers: Sequence[float], width: int, height: int) -> Corners: ...


@dataclasses.dataclass(frozen=True)
class XYWHPixels:
    """x, y of the top left corner, width, height in pixels: COCO's."""

    def corners(self, numbers: Sequence[float], width: int, height: int) -> Corners:
        x, y, w, h = numbers
        return y / height, x / width, (y + h) / height, (x + w) / width


@dataclasses.dataclass(frozen=True)
class XYXYPixels:
    """x1, y1, x2, y2 in pixels: Pascal VOC's."""

    def corners(self, numbers: Sequence[float], width: int, height: int) -> Corners:
        x1, y1, x2, y2 = numbers
        return y1 / height, x1 / width, y2 / height, x2 / width


@dataclasses.dataclass(frozen=True)
class YXYXFractions:
    """y1, x1, y2, x2 as fractions of the picture: TensorFlow Datasets'."""

    def corners(self, numbers: Sequence[float], width: int, height: int) -> Corners:
        y1, x1, y2, x2 = numbers
        return y1, x1, y2, x2


def clip(corners: Sequence[float], slack: float = 1e-3) -> tuple[Corners, str]:
    """The part of a box inside the picture, and what was wrong with it; "" if nothing was.

    No more than `slack` outside is rounding, and not told. Raises DatasetError for a box without
    area in the picture, and for what is no number.
    """
    y1, x1, y2, x2 = (float(value) for value in corners)
    if not all(math.isfinite(value) for value in (y1, x1, y2, x2)):
        raise DatasetError(f"the box {_shown(corners)} holds what is no number. Pixels fit.")
    if y2 <= y1 or x2 <= x1:
        raise DatasetError(
            f"the box {_shown(corners)} has no area. y1 < y2 and x1 < x2 fit. Correct it."
        )
    kept = (max(0.0, y1), max(0.0, x1), min(1.0, y2), min(1.0, x2))
    if kept[2] <= kept[0] or kept[3] <= kept[1]:
        raise DatasetError(
            f"the box {_shown(corners)} is outside of the picture. 0 to 1 fits. Correct it."
        )
    far = max(abs(a - b) for a, b in zip(kept, (y1, x1, y2, x2), strict=True))
    return kept, f"the box {_shown(corners)} leaves the picture; clipped" if far > slack else ""


def _shown(corners: Sequence[float]) -> str:
    return "y1 {:.4g}, x1 {:.4g}, y2 {:.4g}, x2 {:.4g}".format(*map(float, corners))
