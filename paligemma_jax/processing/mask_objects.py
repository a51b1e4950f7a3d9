"""Masks of a picture -> the objects that a model is trained to answer with."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.masks import crop_for_codec, tight_corners
from paligemma_jax.processing.parsing import Box

_BINS = 1023


def encode_masks(codec: MaskCodec, masks: Sequence[np.ndarray], labels: Sequence[str]) -> list[Box]:
    """One object for each mask bool[H, W]: its tight box, its label and its sixteen codes.

    `format_answer` writes them as the suffix to train on. The box is that of the location tokens,
    so that a mask is cut as it will be pasted. Raises InvalidMaskError naming the mask that is
    empty or no mask, and for another number of labels.
    """
    if len(masks) != len(labels):
        raise InvalidMaskError(
            f"{len(masks)} masks and {len(labels)} labels do not go together. One label a mask "
            "fits. Write '' for a mask without a label."
        )
    crops, corners = [], []
    for number, mask in enumerate(masks):
        try:
            tight = np.array(tight_corners(mask))
            # Outward, or a thin object could lose all of its pixels.
            low, high = np.floor(tight[:2] * _BINS), np.ceil(tight[2:] * _BINS)
            y1, x1, y2, x2 = (np.concatenate([low, high]) / _BINS).tolist()
            crops.append(crop_for_codec(mask, (y1, x1, y2, x2)))
        except InvalidMaskError as e:
            raise InvalidMaskError(f"masks[{number}]: {e}") from e
        corners.append((y1, x1, y2, x2))
    if not crops:
        return []
    codes = codec.encode(np.stack(crops)).tolist()
    return [
        Box(label, *box, codes=tuple(row))
        for label, box, row in zip(labels, corners, codes, strict=True)
    ]
