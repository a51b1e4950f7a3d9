"""Masks of the demo world for its mask codec: what 64 x 64 crops of shapes look like."""

import numpy as np

from paligemma_jax.demo.render import shape_mask
from paligemma_jax.demo.scene import Shape, sample_scene
from paligemma_jax.demo.splits import MASKS, split_rng
from paligemma_jax.processing.masks import crop_for_codec

MASK_PICTURE = 448  # pixels a side of the pictures that masks are cut from


def codec_crop(shape: Shape) -> np.ndarray:
    """f32[64, 64] in [0, 1]: the mask of a shape, cut to its box as the codec takes it."""
    bins = np.clip(np.round(np.array(shape.box) * 1023), 0, 1023) / 1023
    y1, x1, y2, x2 = bins.tolist()
    return crop_for_codec(shape_mask(shape, MASK_PICTURE), (y1, x1, y2, x2))


def codec_crops(seed: int, split: int, count: int) -> np.ndarray:
    """f32[count, 64, 64]: crops of the shapes of as many scenes as it takes."""
    crops: list[np.ndarray] = []
    index = 0
    while len(crops) < count:
        scene = sample_scene(split_rng(seed, split + MASKS, index), allow_text=False)
        crops += map(codec_crop, scene.shapes)
        index += 1
    return np.stack(crops[:count])
