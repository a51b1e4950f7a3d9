"""Masks laid over a picture: a veil of colour, and an outline that shows on any background."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from paligemma_jax.viz.palette import Colour

_OPACITY = 0.45


def overlay_masks(
    image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[Colour], line: int
) -> Image.Image:
    """An RGB copy of the picture with each mask bool[H, W] filled and outlined in its colour.

    `line` is the outline's width in pixels; white of a third of it stands around the outline.
    """
    pixels = np.array(image.convert("RGB"), np.float32)
    halo = max(1, line // 3)
    for mask, colour in zip(masks, colours, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:
            continue
        part = np.s_[
            max(0, rows[0] - halo) : rows[-1] + halo + 1,
            max(0, columns[0] - halo) : columns[-1] + halo + 1,
        ]
        inside, cut = mask[part], pixels[part]
        edge = inside & ~_repeat(inside, ImageFilter.MinFilter(3), line)
        cut[inside] += _OPACITY * (np.array(colour) - cut[inside])
        cut[edge] = colour
        cut[_repeat(inside, ImageFilter.MaxFilter(3), halo) & ~inside] = 255
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _repeat(mask: np.ndarray, step: ImageFilter.Filter, times: int) -> np.ndarray:
    picture = Image.fromarray(mask.astype(np.uint8))
    for _ in range(times):
        picture = picture.filter(step)
    return np.asarray(picture) > 0
