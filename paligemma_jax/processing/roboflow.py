"""Pictures as Roboflow's `model.prompt` takes them: OpenCV arrays and torch tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paligemma_jax.errors import InvalidImageError


def picture_list(images: Any, input_color_format: str | None) -> list[Any]:
    """One RGB picture an entry.

    numpy arrays are HWC and BGR unless `input_color_format` says otherwise; torch tensors are CHW
    and RGB; "rgb" or "bgr" goes for both. A 4-D array or tensor is a batch. Anything else (paths,
    PIL pictures) passes as it is. Raises InvalidImageError.
    """
    if input_color_format not in (None, "rgb", "bgr"):
        raise InvalidImageError(
            f"input_color_format {input_color_format!r} is unknown. 'rgb', 'bgr' or None fits."
        )
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [picture for entry in images for picture in picture_list(entry, input_color_format)]
    if type(images).__module__.partition(".")[0] == "torch":
        tensor: Any = images
        array = np.moveaxis(tensor.detach().cpu().numpy(), -3, -1)
        flip = input_color_format == "bgr"
    elif isinstance(images, np.ndarray):
        array, flip = images, input_color_format != "rgb"
    else:
        return [images]
    if flip and array.ndim >= 3 and array.shape[-1] == 3:
        array = np.ascontiguousarray(array[..., ::-1])
    return list(array) if array.ndim == 4 else [array]
