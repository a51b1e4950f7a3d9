"""Random parts of a picture, the answer's boxes going with them.

From PaliGemma's published configurations: a plain resize, `resize_small` with a random crop, and an
Inception crop of at least half of the area (arXiv 2407.07726, section 3.2.4).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from paligemma_jax.data.record import Record
from paligemma_jax.data.text_changes import objects_of
from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.parsing import Box, format_answer

Part = tuple[int, int, int, int]  # left, top, right, bottom in pixels
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A square somewhere along the longer side, a little smaller than the shorter side.

    `part` is the side of the square by the picture's shorter side: 7/8 is big_vision's
    `resize_small(8/7 size)|random_crop(size)`.
    """

    part: float = 7 / 8
    visible: float = 0.3

    def __post_init__(self) -> None:
        _check("part", self.part)
        _check("visible", self.visible)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return _crop(record, self.visible, lambda w, h: self._draw(w, h, rng))

    def _draw(self, width: int, height: int, rng: np.random.Generator) -> Part:
        side = max(1, round(self.part * min(width, height)))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """A rectangle of random area and shape: big_vision's `inception_crop(area_min=50)`.

    Attributes:
      area: the least part of the picture's area, at most 1.
      ratio: the most that the longer side of the rectangle is by its shorter one.
      visible: an object of which a smaller part remains leaves the answer; the boxes of others are
        cut. A crop that cuts through an object with a mask is not taken.
    """

    area: float = 0.5
    ratio: float = 4 / 3
    visible: float = 0.3

    def __post_init__(self) -> None:
        _check("area", self.area)
        _check("visible", self.visible)
        if self.ratio < 1:
            raise ConfigError(
                f"ratio is {self.ratio}. At least 1 fits. Call for example: "
                "InceptionCrop(ratio=4/3)"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return _crop(record, self.visible, lambda w, h: self._draw(w, h, rng))

    def _draw(self, width: int, height: int, rng: np.random.Generator) -> Part:
        for _ in range(100):  # as TensorFlow's sample_distorted_bounding_box
            area = rng.uniform(self.area, 1) * width * height
            ratio = math.exp(rng.uniform(-math.log(self.ratio), math.log(self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


def _crop(record: Record, visible: float, draw: Callable[[int, int], Part]) -> Record:
    """Crops the one picture of a record; others stay, as parts of several would not match."""
    if len(record.images) != 1:
        return record
    picture = load_image(record.images[0])
    objects = objects_of(record)
    for _ in range(_TRIES):
        part = draw(*picture.size)
        kept = [_inside(thing, part, picture) for thing in objects]
        if not any(_cuts_mask(old, new) for old, new in zip(objects, kept, strict=True)):
            break
    else:
        return dataclasses.replace(record, images=(picture,))
    things = [thing for thing, share in kept if thing is not None and share >= visible]
    picture = picture.crop(part)
    suffix = format_answer(things) if objects else record.suffix
    size = None if record.size is None else picture.size
    return dataclasses.replace(record, images=(picture,), suffix=suffix, size=size)


def _inside(thing: Box, part: Part, picture: Image.Image) -> tuple[Box | None, float]:
    """The object as it stands in a part of the picture, and the share of it that is there."""
    left, top, right, bottom = part
    x = [(v * picture.width - left) / (right - left) for v in (thing.x1, thing.x2)]
    y = [(v * picture.height - top) / (bottom - top) for v in (thing.y1, thing.y2)]
    (x1, x2), (y1, y2) = np.clip(x, 0, 1).tolist(), np.clip(y, 0, 1).tolist()
    if x2 <= x1 or y2 <= y1:
        return None, 0.0
    share = (x2 - x1) * (y2 - y1) / ((x[1] - x[0]) * (y[1] - y[0]))
    return dataclasses.replace(thing, y1=y1, x1=x1, y2=y2, x2=x2, span=None), share


def _cuts_mask(old: Box, new: tuple[Box | None, float]) -> bool:
    return old.codes is not None and 0 < new[1] < 1 - 1e-6


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name} is {value}. More than 0, and at most 1, fits. Give it: {name}=1")
