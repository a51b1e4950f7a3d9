"""Few shapes for many requests: every new shape costs a compilation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_TEXT_LENGTH = 16


def bucket(size: int, minimum: int = 1) -> int:
    """The smallest of minimum, 2 minimum, 4 minimum, ... that holds `size`."""
    while minimum < size:
        minimum *= 2
    return minimum


def pictures_of(entry: Any) -> list[Any]:
    """The pictures of one prompt: none for None, several for a list, tuple or 4-D array."""
    if entry is None:
        return []
    if isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray) and entry.ndim == 4):
        return list(entry)
    return [entry]


def group_by_image_count(images: Sequence[Any]) -> dict[int, list[int]]:
    """Number of pictures -> the places in `images` (one entry a prompt) that have that many.

    A batch holds prompts with equally many pictures; these are the batches to make.
    """
    groups: dict[int, list[int]] = {}
    for place, entry in enumerate(images):
        groups.setdefault(len(pictures_of(entry)), []).append(place)
    return groups
