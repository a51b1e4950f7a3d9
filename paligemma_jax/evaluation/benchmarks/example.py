"""One question of a benchmark."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_jax.errors import DatasetError, InvalidImageError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Row
from paligemma_jax.processing.image_source import ImageSource, load_image


@dataclasses.dataclass(frozen=True, eq=False)
class MadePicture:
    """A picture that `make` draws, or reads out of a data set, when it is needed."""

    name: str
    make: Callable[[], ImageSource]


Picture = Path | MadePicture


@dataclasses.dataclass(frozen=True)
class Example:
    """One question: its pictures, prompt and right answer; `row` is the line it is of.

    `answer` and `max_new_tokens` are the benchmark's where they are None.
    """

    id: str | int
    images: tuple[Picture, ...]
    prompt: str
    reference: Any
    row: Row
    answer: Answer | None = None
    max_new_tokens: int | None = None


def open_picture(picture: Picture) -> Image.Image:
    """Raises InvalidImageError for what cannot be read."""
    if not isinstance(picture, MadePicture):
        return load_image(picture)
    try:
        return load_image(picture.make())
    except DatasetError as e:
        raise InvalidImageError(f"{picture.name}: {e}") from e
