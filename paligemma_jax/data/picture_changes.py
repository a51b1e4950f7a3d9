"""Changes to the pixels of pictures, of which the answer knows nothing.

From PaliGemma's pretraining (arXiv 2407.07726, section 3.2.4): the way of resizing drawn at random,
and pictures saved as JPEG once more. Its authors saw no gain from them in transfers.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from paligemma_jax.data.kernels import MITCHELL, Area, Cubic, Kernel, Lanczos, Triangle, resize
from paligemma_jax.data.record import Record
from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.image_source import load_image


@dataclasses.dataclass(frozen=True)
class RandomResize:
    """Resizes to the model's size with a kernel, and with or without antialias, at random.

    `size` in pixels is that of the processor, `processor.image.size`, which then leaves pictures as
    they are. It squashes to a square, so it comes after crops.
    """

    size: int
    kernels: tuple[Kernel, ...] = (Triangle(), Cubic(), Lanczos(), Area(), MITCHELL)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        # One way for all frames: they show the same thing.
        kernel = self.kernels[int(rng.integers(len(self.kernels)))]
        antialias = bool(rng.integers(2))

        def change(picture: Image.Image) -> Image.Image:
            return Image.fromarray(resize(np.asarray(picture), self.size, kernel, antialias))

        return _each(dataclasses.replace(record, size=None), change)


@dataclasses.dataclass(frozen=True)
class RandomJpeg:
    """Saves and loads pictures as JPEG of random quality, with probability `chance`."""

    chance: float = 0.5
    quality: tuple[int, int] = (75, 95)  # the least and the most

    def __post_init__(self) -> None:
        low, high = self.quality
        if not (0 <= self.chance <= 1 and 1 <= low <= high <= 100):
            raise ConfigError(
                f"A chance of {self.chance} and a quality of {low} to {high} do not fit. 0 to 1, "
                "and 1 to 100, do. Call for example: RandomJpeg(chance=0.5, quality=(75, 95))"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if rng.random() >= self.chance:
            return record
        quality = int(rng.integers(self.quality[0], self.quality[1] + 1))

        def change(picture: Image.Image) -> Image.Image:
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=quality)
            with Image.open(out, formats=("JPEG",)) as saved:
                return saved.convert("RGB")

        return _each(record, change)


def _each(record: Record, change: Callable[[Image.Image], Image.Image]) -> Record:
    pictures = tuple(change(load_image(picture)) for picture in record.images)
    return dataclasses.replace(record, images=pictures)
