"""Transforms of records: choice of an answer, prompts and boxes, random crops.

Crops are those of PaliGemma's published configurations (arXiv 2407.07726, section 3.2.4); the
boxes of the answer move with them.
"""

import collections
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from paligemma_jax.data.record import Record
from paligemma_jax.errors import ConfigError, DatasetError, InvalidPromptError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.location_tokens import Box, format_answer, parse_answer
from paligemma_jax.processing.prompts import split_labels

OBJECT_PROMPT = re.compile(r"(detect|segment) (.+)", re.DOTALL)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RandomAnswer:
    """One of the answers at random: big_vision's `choice`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, record.answers[int(rng.integers(len(record.answers)))])


@dataclasses.dataclass(frozen=True)
class CycleAnswers:
    """Another answer every epoch, each once before any repeats: `choice_no_replacement`.

    The order is random, and another one for each record.
    """

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        index = index_in_turn(record, len(record.answers), self.seed)
        return _only(record, record.answers[index])


@dataclasses.dataclass(frozen=True)
class MostFrequentAnswer:
    """The answer that most annotators gave, of equals the first: big_vision's `majority`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, collections.Counter(record.answers).most_common(1)[0][0])


def index_in_turn(record: Record, count: int, seed: int) -> int:
    """Which of `count` things comes in the record's epoch, each once before any comes again."""
    # A new order for each round, by the record's id: nothing has to be remembered.
    turn, position = divmod(record.epoch, count)
    key = [seed, turn, zlib.crc32(record.id.encode("utf-8", "replace"))]
    return int(np.random.default_rng(key).permutation(count)[position])


def _only(record: Record, answer: str) -> Record:
    return dataclasses.replace(record, suffix=answer, answers=())


@dataclasses.dataclass(frozen=True)
class LowerCase:
    """Prompt and answer in lower case, or one of them."""

    prefix: bool = True
    suffix: bool = True

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if self.prefix:
            record = dataclasses.replace(record, prefix=record.prefix.lower())
        if self.suffix:
            answers = tuple(answer.lower() for answer in record.answers)
            record = dataclasses.replace(record, suffix=record.suffix.lower(), answers=answers)
        return record


@dataclasses.dataclass(frozen=True)
class ShuffleBoxes:
    """The objects of an answer in random order, as none is right.

    With `shuffle_labels` those that the prompt asks for as well. Answers without objects stay.
    """

    shuffle_labels: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if objects := objects_of(record):
            suffix = format_answer(_shuffled(objects, rng))
            record = dataclasses.replace(record, suffix=suffix)
        asked = OBJECT_PROMPT.fullmatch(record.prefix) if self.shuffle_labels else None
        if asked:
            labels = _shuffled(split_labels(asked[2]), rng)
            record = dataclasses.replace(record, prefix=f"{asked[1]} {' ; '.join(labels)}")
        return record


@dataclasses.dataclass(frozen=True)
class SampleClasses:
    """A prompt that asks for a sample of the classes: some in the image, and some that are not.

    Attributes:
      classes: all that can be asked for; without, those of the record's own prompt.
      max_present: how many of the classes in the image are asked for, at random; None: all. The
        boxes of the others leave the answer.
      max_negatives: how many absent ones are asked for, at most; the number is random. A record
        without objects is asked for at least one.
    """

    classes: tuple[str, ...] = ()
    max_present: int | None = None
    max_negatives: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        asked = OBJECT_PROMPT.fullmatch(record.prefix)
        if not asked:
            return record
        known = list(self.classes or split_labels(asked[2]))
        objects = objects_of(record)
        present = list(dict.fromkeys(thing.label for thing in objects))
        unknown = [label for label in present if label not in known]
        if unknown:
            raise DatasetError(
                f"{record.id}: expected objects of the classes {', '.join(known)}, got "
                f"{', '.join(unknown)}. Add them: SampleClasses(classes=(...))"
            )
        count = len(present) if self.max_present is None else min(self.max_present, len(present))
        chosen = _shuffled(present, rng)[:count]
        absent = [label for label in known if label not in present]
        negatives = int(rng.integers(self.max_negatives + 1)) if self.max_negatives else 0
        negatives = max(negatives, 0 if chosen else 1)
        labels = _shuffled(chosen + _shuffled(absent, rng)[:negatives], rng)
        kept = [thing for thing in objects if thing.label in chosen]
        return dataclasses.replace(
            record, prefix=f"{asked[1]} {' ; '.join(labels)}", suffix=format_answer(kept)
        )


def objects_of(record: Record) -> tuple[Box, ...]:
    """The objects of an answer; none for one of words alone.

    Raises DatasetError for an answer of which a part would be lost.
    """
    if "<loc" not in record.suffix:
        return ()
    answer = parse_answer(record.suffix)
    if answer.unparsed:
        piece = answer.unparsed[0]
        raise DatasetError(
            f"{record.id}: expected four locations and a label for each object, with ; between, "
            f"got {piece.text!r} in the answer: {piece.reason}"
        )
    try:
        format_answer(answer.objects)
    except InvalidPromptError as e:
        raise DatasetError(f"{record.id}: {e}") from e
    return answer.objects


def _shuffled(values: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [values[int(i)] for i in rng.permutation(len(values))]


Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A square somewhere along the longer side, a little smaller than the shorter side.

    Attributes:
      scale: the side of the square, relative to the image's shorter side: 7/8 is big_vision's
        `resize_small(8/7 size)|random_crop(size)`.
      min_visible: as of `InceptionCrop`.
    """

    scale: float = 7 / 8
    min_visible: float = 0.3

    def __post_init__(self) -> None:
        _check_fractions(scale=self.scale, min_visible=self.min_visible)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return _crop(record, self.min_visible, lambda w, h: self._region(w, h, rng))

    def _region(self, width: int, height: int, rng: np.random.Generator) -> Region:
        side = max(1, round(self.scale * min(width, height)))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """A rectangle of random area and shape: big_vision's `inception_crop(area_min=50)`.

    Attributes:
      min_area: fraction of the image's area, at least.
      max_ratio: longer side of the rectangle by its shorter one, at most.
      min_visible: an object of which a smaller fraction remains leaves the answer; the boxes of
        others are clipped. A crop that cuts through an object with a mask is not taken.
    """

    min_area: float = 0.5
    max_ratio: float = 4 / 3
    min_visible: float = 0.3

    def __post_init__(self) -> None:
        _check_fractions(min_area=self.min_area, min_visible=self.min_visible)
        if self.max_ratio < 1:
            raise ConfigError(f"max_ratio must be at least 1, got {self.max_ratio}")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return _crop(record, self.min_visible, lambda w, h: self._region(w, h, rng))

    def _region(self, width: int, height: int, rng: np.random.Generator) -> Region:
        for _ in range(100):  # as TensorFlow's sample_distorted_bounding_box
            area = rng.uniform(self.min_area, 1) * width * height
            ratio = math.exp(rng.uniform(-math.log(self.max_ratio), math.log(self.max_ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


def _crop(record: Record, min_visible: float, sample: Callable[[int, int], Region]) -> Record:
    """Crops the one image of a record; several stay, as their regions would not match."""
    if len(record.images) != 1:
        return record
    image = load_image(record.images[0])
    objects = objects_of(record)
    for _ in range(_TRIES):
        region = sample(*image.size)
        kept = [_inside(thing, region, image) for thing in objects]
        visible = [
            fraction for thing, (_, fraction) in zip(objects, kept, strict=True) if thing.codes
        ]
        if not any(0 < fraction < 1 - 1e-6 for fraction in visible):  # no mask is cut
            break
    else:
        return dataclasses.replace(record, images=(image,))
    things = [thing for thing, fraction in kept if thing is not None and fraction >= min_visible]
    image = image.crop(region)
    suffix = format_answer(things) if objects else record.suffix
    size = None if record.size is None else image.size
    return dataclasses.replace(record, images=(image,), suffix=suffix, size=size)


def _inside(thing: Box, region: Region, image: Image.Image) -> tuple[Box | None, float]:
    """The object as it stands in a region of the image, and the fraction of it that is there."""
    left, top, right, bottom = region
    x = [(v * image.width - left) / (right - left) for v in (thing.x1, thing.x2)]
    y = [(v * image.height - top) / (bottom - top) for v in (thing.y1, thing.y2)]
    (x1, x2), (y1, y2) = np.clip(x, 0, 1).tolist(), np.clip(y, 0, 1).tolist()
    if x2 <= x1 or y2 <= y1:
        return None, 0.0
    fraction = (x2 - x1) * (y2 - y1) / ((x[1] - x[0]) * (y[1] - y[0]))
    return dataclasses.replace(thing, y1=y1, x1=x1, y2=y2, x2=x2, span=None), fraction


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{name} must be more than 0 and at most 1, got {value}")
