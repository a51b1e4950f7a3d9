"""Outlines <-> masks.

Positions are x, y in pixels from the picture's top left corner; pixel (row r, column c) covers c to
c + 1 and r to r + 1, and is in the polygon if its centre is. A traced outline runs along the edges
of pixels, so a mask that is traced and filled again is the same mask.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.rle import check_mask

Ring = tuple[tuple[float, float], ...]
_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # right, down, left, up as x, y


@dataclasses.dataclass(frozen=True)
class Polygon:
    """One connected area: its outline, and those of the holes in it, as x, y in pixels."""

    exterior: Ring
    holes: tuple[Ring, ...] = ()

    def __post_init__(self) -> None:
        for ring in (self.exterior, *self.holes):
            if len(ring) < 3:
                raise InvalidMaskError(
                    f"A polygon of {len(ring)} points has no area. At least 3 points (x, y) fit. "
                    "Leave it out, or give the corners of the object."
                )

    @classmethod
    def from_coco(cls, numbers: Sequence[float]) -> "Polygon":
        """Of COCO's flat list x, y, x, y, ...; raises InvalidMaskError."""
        if len(numbers) % 2:
            raise InvalidMaskError(
                f"A polygon of {len(numbers)} numbers is no list of points. Pairs x, y, x, y, ... "
                "fit. A list of polygons goes in one by one."
            )
        points = np.asarray(numbers, float).reshape(-1, 2)
        return cls(tuple((float(x), float(y)) for x, y in points))


def polygons_to_mask(polygons: Iterable[Polygon], height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of pixels whose centres are in any of `polygons`.

    Raises InvalidMaskError for a point more than one pixel outside the picture.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        rings = [np.asarray(ring, float) for ring in (polygon.exterior, *polygon.holes)]
        for points in rings:
            _check_inside(points, height, width)
        mask |= _fill(rings, height, width)
    return mask


def mask_to_polygons(mask: np.ndarray) -> tuple[Polygon, ...]:
    """Outlines of a mask bool[H, W], one polygon for each area connected by the sides of pixels.

    Exteriors run clockwise as seen, holes the other way. An empty mask has none. Raises
    InvalidMaskError for another kind of array.
    """
    rings = _trace(check_mask(mask))
    outer = [ring for ring in rings if _twice_area(ring) > 0]
    holes: list[list[Ring]] = [[] for _ in outer]
    if len(outer) < len(rings):
        # An area that encloses others comes after them, so the first that holds a hole owns it.
        outer.sort(key=_twice_area)
        low = np.array([ring.min(axis=0) for ring in outer])
        high = np.array([ring.max(axis=0) for ring in outer])
        for ring in rings:
            if _twice_area(ring) < 0:
                inside = _beside(ring)
                near = np.flatnonzero(((low < inside) & (inside < high)).all(axis=1))
                owner = next(place for place in near if _holds(outer[place], inside))
                holes[owner].append(_ring(ring))
    found = [Polygon(_ring(ring), tuple(cut)) for ring, cut in zip(outer, holes, strict=True)]
    return tuple(sorted(found, key=lambda polygon: polygon.exterior[0][::-1]))


def _check_inside(points: np.ndarray, height: int, width: int) -> None:
    if not (points.min() >= -1 and points[:, 0].max() <= width + 1
            and points[:, 1].max() <= height + 1):  # fmt: skip
        low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        raise InvalidMaskError(
            f"A polygon from {low} to {high} (x, y) leaves the picture of {width} x {height} "
            "pixels. Points inside it fit. Give the size of the picture it was drawn on."
        )


def _fill(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Even-odd rule at the centres of pixels."""
    turns = np.zeros((height, width + 1), np.int32)
    for points in rings:
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            # Rows whose centre r + 0.5 is in [y0, y1): each corner counts once.
            rows = np.arange(max(0, int(np.ceil(y0 - 0.5))), min(height, int(np.ceil(y1 - 0.5))))
            if rows.size:
                crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
                columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
                turns[rows, columns] += 1
    return np.cumsum(turns, axis=1)[:, :width] % 2 == 1


def _trace(mask: np.ndarray) -> list[np.ndarray]:
    """Corners i[n, 2] of every closed outline, with the mask to the right of each step."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    # For each step of _STEPS: the pixel on its left is outside, and where the step begins.
    outside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    begins = ((0, 0), (1, 0), (1, 1), (0, 1))
    leaving: dict[tuple[int, int], list[int]] = {}
    for way, (neighbour, (right, down)) in enumerate(zip(outside, begins, strict=True)):
        rows, columns = np.nonzero(inner & ~neighbour)
        for x, y in zip((columns + right).tolist(), (rows + down).tolist(), strict=True):
            leaving.setdefault((x, y), []).append(way)
    return [_follow(leaving, start) for start in sorted(leaving) if start in leaving]


def _follow(leaving: dict[tuple[int, int], list[int]], start: tuple[int, int]) -> np.ndarray:
    """Takes one closed outline from `leaving`, which maps positions to the steps from there."""
    first = leaving[start][0]
    corners: list[tuple[int, int]] = []
    position, way, turned = start, first, True
    while True:
        if turned:
            corners.append(position)
        step = _STEPS[way]
        position = (position[0] + int(step[0]), position[1] + int(step[1]))
        # Where two pixels touch at a corner only, a right turn stays with the same pixel.
        choices = leaving[position]
        following = next(w for w in ((way + 1) % 4, way, (way + 3) % 4) if w in choices)
        choices.remove(following)
        if not choices:
            del leaving[position]
        turned = following != way
        way = following
        if (position, way) == (start, first):
            # The start need not be a corner.
            return np.array(corners if turned else corners[1:])


def _ring(points: np.ndarray) -> Ring:
    return tuple((float(x), float(y)) for x, y in points)


def _twice_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def _beside(points: np.ndarray) -> np.ndarray:
    """The centre x, y of a pixel of the mask, to the right of an outline's first step."""
    step = np.sign(points[1] - points[0])
    return points[0] + 0.5 * step + 0.5 * np.array([-step[1], step[0]])


def _holds(points: np.ndarray, position: np.ndarray) -> bool:
    ends = np.roll(points, -1, axis=0)
    low, high = np.minimum(points[:, 1], ends[:, 1]), np.maximum(points[:, 1], ends[:, 1])
    # Outlines of pixels: only upright sides are crossed by a line along a row.
    crossed = (low <= position[1]) & (position[1] < high) & (points[:, 0] > position[0])
    return bool(np.count_nonzero(crossed) % 2)
