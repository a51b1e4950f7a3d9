"""Outlines of masks and masks of outlines."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.masks import Polygon, mask_to_polygons, polygons_to_mask

SQUARE = ((1.0, 1.0), (4.0, 1.0), (4.0, 3.0), (1.0, 3.0))


def test_rectangle_covers_its_pixels():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 1:4] = True
    assert mask_to_polygons(mask) == (Polygon(SQUARE),)
    np.testing.assert_array_equal(polygons_to_mask([Polygon(SQUARE)], 5, 6), mask)


def test_hole_and_island():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    ring, island = mask_to_polygons(mask)
    assert len(ring.holes) == 1 and not island.holes
    assert set(ring.exterior) == {(1, 1), (8, 1), (8, 8), (1, 8)}
    assert set(ring.holes[0]) == {(2, 2), (7, 2), (7, 7), (2, 7)}
    np.testing.assert_array_equal(polygons_to_mask([ring, island], 9, 9), mask)
    filled = polygons_to_mask([Polygon(ring.exterior)], 9, 9)
    assert filled[1:8, 1:8].all()


def test_pixels_that_touch_at_a_corner_are_two_areas():
    assert len(mask_to_polygons(np.eye(3, dtype=bool))) == 3
    assert mask_to_polygons(np.zeros((3, 3), bool)) == ()


@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_traced_and_filled_is_the_same(mask: np.ndarray):
    polygons = mask_to_polygons(mask)
    np.testing.assert_array_equal(polygons_to_mask(polygons, *mask.shape), mask)
    for polygon in polygons:  # no corner lies on a straight line
        for ring in (polygon.exterior, *polygon.holes):
            points = np.array(ring)
            before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
            assert (before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]).all()


def test_overlapping_polygons_are_joined():
    other = Polygon(tuple((x + 1, y) for x, y in SQUARE))
    assert polygons_to_mask([Polygon(SQUARE), other], 5, 6).sum() == 8


def test_slanted_sides_follow_the_centres_of_pixels():
    triangle = Polygon.from_coco([0, 0, 8, 0, 0, 8])
    rows, columns = np.mgrid[:8, :8] + 0.5
    np.testing.assert_array_equal(polygons_to_mask([triangle], 8, 8), rows + columns < 8)


def test_pycocotools_agrees_within_the_outline():
    coco = pytest.importorskip("pycocotools.mask")
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    points = np.stack([50 + 40 * np.cos(angles), 40 + 30 * np.sin(angles)], 1).ravel().tolist()
    theirs = coco.decode(coco.frPyObjects([points], 80, 100))[..., 0].astype(bool)
    ours = polygons_to_mask([Polygon.from_coco(points)], 80, 100)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


@pytest.mark.parametrize(
    "numbers, message",
    [([], "0 points"), ([1, 1, 2, 2], "2 points"), ([1, 1, 2, 2, 3], "5 numbers")],
)
def test_no_polygons(numbers: list[float], message: str):
    with pytest.raises(InvalidMaskError, match=message):
        Polygon.from_coco(numbers)


@pytest.mark.parametrize("far", [-2.0, 8.0, float("nan"), float("inf")])
def test_outside_of_the_picture(far: float):
    with pytest.raises(InvalidMaskError, match="leaves the picture of 6 x 5"):
        polygons_to_mask([Polygon(((0.0, 0.0), (far, 1.0), (2.0, 3.0)))], 5, 6)
