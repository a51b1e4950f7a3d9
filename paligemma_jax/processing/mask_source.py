"""Masks from what annotators leave behind: PNG files, COCO's polygons and run lengths."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.polygons import Polygon, polygons_to_mask
from paligemma_jax.processing.rle import RLE

MaskSource = str | os.PathLike[str] | Image.Image | np.ndarray
_MOST_PIXELS = 1 << 28


def load_mask(source: MaskSource, value: int | None = None) -> np.ndarray:
    """The mask bool[H, W] of a picture of one channel: a path, a PIL picture, or an array.

    Inside is what has `value` (an instance or class in a map of labels; the index in pictures with
    a palette). Without it, inside is what is brighter than half of the brightest pixel, so that
    0 and 1, 0 and 255, and soft edges are all read as they are meant.

    Raises InvalidMaskError for what is no mask.
    """
    pixels = _pixels(source)
    if pixels.dtype == bool and value is None:
        return pixels
    if value is not None:
        return pixels == value
    brightest = pixels.max(initial=0)
    return pixels > brightest / 2


def mask_from_coco(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of COCO's "segmentation": polygons, or run lengths of any kind.

    Raises InvalidMaskError for anything else, and for run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        rle = RLE.from_coco(segmentation)
        if (rle.height, rle.width) != (height, width):
            raise InvalidMaskError(
                f"The run lengths are of a picture of {rle.height} x {rle.width} pixels, not of "
                f'{height} x {width}. Masks of the picture\'s own size fit. Check "size".'
            )
        return rle.to_mask()
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and segmentation:
        polygons = [Polygon.from_coco(numbers) for numbers in segmentation]
        return polygons_to_mask(polygons, height, width)
    raise InvalidMaskError(
        f"{str(segmentation)[:80]!r} is no segmentation of COCO's. A list of polygons, or a "
        'dictionary of "size" and "counts", fits.'
    )


def _pixels(source: MaskSource) -> np.ndarray:
    if isinstance(source, np.ndarray):
        pixels = source
    else:
        try:
            image = source if isinstance(source, Image.Image) else Image.open(Path(source))
            if image.width * image.height > _MOST_PIXELS:
                raise InvalidMaskError(
                    f"A mask of {image.height} x {image.width} pixels is too large. At most "
                    f"{_MOST_PIXELS:,} pixels fit."
                )
            pixels = np.asarray(image)
        except (OSError, UnidentifiedImageError, SyntaxError) as e:
            raise InvalidMaskError(
                f"{source} cannot be read as a mask: {e}. A picture file of one channel, such as a "
                "grey PNG, fits."
            ) from e
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3) and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # grey, saved as RGB
    if pixels.ndim != 2 or not pixels.size or pixels.dtype.kind not in "biuf":
        raise InvalidMaskError(
            f"Pixels of shape {list(pixels.shape)} ({pixels.dtype}) are no mask. [height, width], "
            "one number a pixel, fits. Choose a channel: pixels[..., 0]"
        )
    return pixels
