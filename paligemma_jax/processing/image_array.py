"""numpy pictures: which arrays are one, and what their numbers mean."""

import numpy as np
from PIL import Image

from paligemma_jax.errors import InvalidImageError

_WANTED = "uint8 in 0..255 or float in 0..1, shaped [height, width] or [height, width, 1 | 3 | 4],"


def image_from_array(array: np.ndarray) -> Image.Image:
    """RGB `PIL.Image` of uint8 (0..255) or floating (0..1) [H, W], [H, W, 1], [H, W, 3], [H, W, 4].

    Channels are red, green, blue and an alpha that is dropped; floats are rounded to 8 bit. Raises
    InvalidImageError for anything else: the range of a float array is never guessed.
    """
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    color = array.ndim == 3 and array.shape[2] in (3, 4)
    if not (grey or color) or array.size == 0:
        raise InvalidImageError(
            f"An array of shape {array.shape} is no picture. {_WANTED} fits. {_advice(array)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        array = _from_unit_range(array)
    elif array.dtype != np.uint8:
        raise InvalidImageError(
            f"An array of {array.dtype} has no known range. {_WANTED} fits. "
            "Convert it, for example: array.astype('uint8')"
        )
    if grey:
        return Image.fromarray(array.reshape(array.shape[:2])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]))


def _from_unit_range(array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise InvalidImageError(
            f"A float array with values from {low:g} to {high:g} is no picture. Floats from 0 to "
            "1, or uint8, fit. Convert it, for example: array.astype('uint8')"
        )
    return np.round(array.astype(np.float32) * 255).astype(np.uint8)


def _advice(array: np.ndarray) -> str:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return "Channels come last; use: array.transpose(1, 2, 0)"
    if array.ndim == 4:
        return "For several pictures pass a list: list(array)"
    return "Check how the array was made."
