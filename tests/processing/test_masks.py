"""Masks cut for the codec and put back."""

import numpy as np
import pytest

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.masks import crop_for_codec, paste, pixel_corners, tight_corners


def disc(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - 0.4 * height) ** 2 + (columns - 0.6 * width) ** 2 < (0.3 * height) ** 2


def test_tight_corners():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    assert tight_corners(mask) == (0.2, 0.2, 0.5, 0.5)
    assert pixel_corners((0.2, 0.2, 0.5, 0.5), 10, 20) == (2, 4, 5, 10)


@pytest.mark.parametrize("size", [(30, 50), (200, 150), (900, 1200)])
def test_cut_and_put_back(size: tuple[int, int]):
    mask = disc(*size)
    corners = tight_corners(mask)
    crop = crop_for_codec(mask, corners)
    assert crop.shape == (64, 64) and crop.dtype == np.float32
    assert crop.min() >= 0 and crop.max() <= 1 + 1e-6
    again = paste(crop, corners, *size)
    assert (again & mask).sum() / (again | mask).sum() > 0.97


def test_crop_of_the_same_size_is_the_mask():
    mask = disc(64, 64)
    np.testing.assert_array_equal(crop_for_codec(mask, (0, 0, 1, 1)), mask.astype(np.float32))
    np.testing.assert_array_equal(paste(mask.astype(np.float32), (0, 0, 1, 1), 64, 64), mask)


def test_paste_stays_in_the_box():
    mask = paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.5, 0.9), 20, 10)
    assert mask[2:10, 2:9].all() and mask.sum() == 8 * 7
    assert not paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.1, 0.9), 20, 10).any()
    assert not paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.1004, 0.9), 20, 10).any()


@pytest.mark.parametrize(
    "corners", [(0, 0, 1.1, 1), (-0.1, 0, 1, 1), (1, 0, 0, 1), (0, 0, float("nan"), 1)]
)
def test_corners_out_of_range(corners: tuple[float, ...]):
    for call in (
        lambda: crop_for_codec(disc(9, 9), corners),
        lambda: paste(np.zeros((64, 64), np.float32), corners, 9, 9),
    ):
        with pytest.raises(InvalidMaskError, match="are no box"):
            call()


def test_nothing_to_cut():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    with pytest.raises(InvalidMaskError, match="has no area"):
        crop_for_codec(mask, (0.5, 0.5, 0.5, 0.9))
    with pytest.raises(InvalidMaskError, match="empty inside the box"):
        crop_for_codec(mask, (0.5, 0.5, 1.0, 1.0))
    with pytest.raises(InvalidMaskError, match="is empty"):
        tight_corners(mask & False)
    with pytest.raises(InvalidMaskError, match="is no mask"):
        crop_for_codec(mask.astype(np.uint8), (0, 0, 1, 1))
    with pytest.raises(InvalidMaskError, match=r"\[32, 32\]"):
        paste(np.zeros((32, 32)), (0, 0, 1, 1), 9, 9)
