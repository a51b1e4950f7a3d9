"""Outlines of the five shapes, and boxes, in normalised picture coordinates."""

import functools
import math

import numpy as np

Box = tuple[float, float, float, float]  # y1, x1, y2, x2, each 0..1


def _star(inner: float) -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, turn = (1.0 if i % 2 == 0 else inner), math.pi * i / 5
        points.append((-radius * math.cos(turn), radius * math.sin(turn)))
    return points


def _cross(arm: float) -> list[tuple[float, float]]:
    a = arm
    return [(-1, -a), (-1, a), (-a, a), (-a, 1), (a, 1), (a, a), (1, a), (1, -a), (a, -a), (a, -1),
            (-a, -1), (-a, -a)]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def outline(kind: str, angle: float, style: float) -> np.ndarray:
    """Returns the polygon of a shape, scaled so that its longer bounding-box side is 1.

    Args:
      kind: "square", "triangle", "star" or "cross" (a circle has no corners).
      angle: rotation in degrees, clockwise.
      style: 0..1, how fat a star or a cross is.

    Returns:
      float64[corners, 2] of (y, x), from (0, 0) to the extent of the bounding box.
    """
    if kind == "square":
        points = [(-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)]
    elif kind == "triangle":
        points = [(-0.9, 0.0), (0.85, 1.0), (0.85, -1.0)]
    elif kind == "star":
        points = _star(0.40 + 0.08 * style)
    elif kind == "cross":
        points = _cross(0.28 + 0.10 * style)
    else:
        raise ValueError(
            f'"{kind}" has no outline. Shapes with corners: square, triangle, star, cross.'
        )
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    corners = np.array(points, np.float64) @ rotation
    corners -= corners.min(axis=0)
    return corners / corners.max()


def extent(kind: str, angle: float, style: float) -> tuple[float, float]:
    """Returns (height, width) of a shape's bounding box whose longer side is 1."""
    if kind == "circle":
        return 1.0, 1.0
    height, width = outline(kind, angle, style).max(axis=0)
    return float(height), float(width)


def centre(box: Box) -> tuple[float, float]:
    """Returns the (y, x) centre of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_around(y: float, x: float, height: float, width: float) -> Box:
    """Returns the box of a given size around a centre."""
    return y - height / 2, x - width / 2, y + height / 2, x + width / 2


def apart(a: Box, b: Box, gap: float) -> bool:
    """Returns whether two boxes keep at least `gap` between them on some axis."""
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]
