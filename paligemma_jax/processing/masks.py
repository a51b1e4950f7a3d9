"""Masks in a picture <-> the 64 x 64 crops that the mask codec reads and writes.

Corners are y1, x1, y2, x2 as fractions of the picture's height and width.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.resample import resize_bilinear_antialias
from paligemma_jax.processing.rle import check_mask

_SIDE = 64  # pixels of a crop

Corners = tuple[float, float, float, float]


def tight_corners(mask: np.ndarray) -> Corners:
    """The smallest box around a mask bool[H, W]; raises InvalidMaskError for an empty one."""
    mask = check_mask(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise InvalidMaskError(
            f"The mask of {mask.shape[0]} x {mask.shape[1]} pixels is empty, so it has no box. At "
            "least one pixel in it fits. Leave the object out."
        )
    height, width = mask.shape
    return (
        float(rows[0] / height),
        float(columns[0] / width),
        float((rows[-1] + 1) / height),
        float((columns[-1] + 1) / width),
    )


def pixel_corners(corners: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """y1, x1, y2, x2 in whole pixels, each rounded; a thin box may come out without pixels.

    Raises InvalidMaskError for corners outside [0, 1] or out of order.
    """
    y1, x1, y2, x2 = (float(corner) for corner in corners)
    if not (0 <= y1 <= y2 <= 1 and 0 <= x1 <= x2 <= 1):
        raise InvalidMaskError(
            f"The corners {(y1, x1, y2, x2)} are no box. y1 <= y2 and x1 <= x2, all from 0 to 1, "
            "fit. Divide pixels by the height and width of the picture."
        )
    return round(height * y1), round(width * x1), round(height * y2), round(width * x2)


def crop_for_codec(mask: np.ndarray, corners: Sequence[float]) -> np.ndarray:
    """The crop f32[64, 64] in [0, 1] of a mask bool[H, W], resized bilinearly with antialiasing.

    As big_vision makes training data. Raises InvalidMaskError for another kind of array, for a box
    without pixels and for one without any part of the mask.
    """
    mask = check_mask(mask)
    y1, x1, y2, x2 = pixel_corners(corners, *mask.shape)
    if y1 == y2 or x1 == x2:
        raise InvalidMaskError(
            f"The box {tuple(corners)} has no area in a mask of {mask.shape[0]} x {mask.shape[1]} "
            "pixels. A box of at least one pixel fits. See tight_corners(mask)."
        )
    crop = mask[y1:y2, x1:x2]
    if not crop.any():
        raise InvalidMaskError(
            f"The mask is empty inside the box {tuple(corners)}. A box around the object fits. See "
            "tight_corners(mask)."
        )
    return resize_bilinear_antialias(crop[..., None].astype(np.float32), _SIDE, _SIDE)[..., 0]


def paste(crop: np.ndarray, corners: Sequence[float], height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of a decoded crop f32[64, 64]: where it is above 0.5.

    The crop is resized bilinearly to the box in whole pixels; a box without pixels gives an empty
    mask. Raises InvalidMaskError for another shape and for corners that are no box.
    """
    crop = np.asarray(crop, np.float32)
    if crop.shape != (_SIDE, _SIDE):
        raise InvalidMaskError(
            f"A crop of shape {list(crop.shape)} does not fit. [{_SIDE}, {_SIDE}] fits, as "
            "MaskCodec.decode gives it for each mask. Take one: crops[0]"
        )
    y1, x1, y2, x2 = pixel_corners(corners, height, width)
    mask = np.zeros((height, width), bool)
    if y2 > y1 and x2 > x1:
        resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        mask[y1:y2, x1:x2] = np.asarray(resized) > 0.5
    return mask
