"""Random parts of a picture, the answer's boxes going with them.

From PaliGemma's published configurations: a plain resize, `resize_small` with a random crop, and an
Inception crop of at least half of the area (arXiv 2407.07726, section 3.2.4).

Changes to prompts and answers that leave pictures alone.

One of several answers to learn from.

Ways to resize a picture that were drawn at random in PaliGemma's pretraining.

They are those of `tf.image.resize`: the kernel is centred on each output pixel, is stretched when
shrinking with antialias, and its weights add to one at the edges too.

Changes to the pixels of pictures, of which the answer knows nothing.

From PaliGemma's pretraining (arXiv 2407.07726, section 3.2.4): the way of resizing drawn at random,
and pictures saved as JPEG once more. Its authors saw no gain from them in transfers.
"""

import collections
import dataclasses
import io
import math
import re
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from paligemma_jax.data.record import Record
from paligemma_jax.errors import ConfigError, DatasetError, InvalidPromptError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.location_tokens import Box, format_answer, parse_answer
from paligemma_jax.processing.prompts import split_labels

ASK = re.compile(r"(detect|segment) (.+)", re.DOTALL)  # prompts about objects


@dataclasses.dataclass(frozen=True)
class LowerCase:
    """Prompt and answer in small letters, or one of them, as some data sets are learnt."""

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
    """The objects of an answer in random order, so that none is learnt.

    With `shuffle_labels` those that the prompt asks for as well. Answers without objects stay.
    """

    shuffle_labels: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        objects = objects_of(record)
        if objects:
            order = rng.permutation(len(objects))
            suffix = format_answer([objects[int(place)] for place in order])
            record = dataclasses.replace(record, suffix=suffix)
        asked = ASK.fullmatch(record.prefix) if self.shuffle_labels else None
        if asked:
            labels = list(split_labels(asked[2]))
            labels = [labels[int(place)] for place in rng.permutation(len(labels))]
            record = dataclasses.replace(record, prefix=f"{asked[1]} {' ; '.join(labels)}")
        return record


@dataclasses.dataclass(frozen=True)
class SampleClasses:
    """A prompt that asks for some of the classes: those that are there, and others that are not.

    Attributes:
      classes: all that can be asked for; without, those of the record's own prompt.
      max_present: how many of those present are asked for, drawn at random; all if None. The boxes of the
        others leave the answer.
      max_negatives: how many absent ones are asked for, up to this number, drawn anew each time.
        A record without objects is asked for at least one.
    """

    classes: tuple[str, ...] = ()
    max_present: int | None = None
    max_negatives: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        asked = ASK.fullmatch(record.prefix)
        if not asked:
            return record
        known = list(self.classes or split_labels(asked[2]))
        objects = objects_of(record)
        present = list(dict.fromkeys(thing.label for thing in objects))
        unknown = [label for label in present if label not in known]
        if unknown:
            raise DatasetError(
                f"{record.id} has objects of {', '.join(unknown)}, which is none of the classes. "
                "All classes of the data fit. Add them: SampleClasses(classes=(...))"
            )
        count = len(present) if self.max_present is None else min(self.max_present, len(present))
        chosen = [present[int(place)] for place in rng.permutation(len(present))[:count]]
        absent = [label for label in known if label not in present]
        wanted = int(rng.integers(self.max_negatives + 1)) if self.max_negatives else 0
        wanted = min(len(absent), max(wanted, 0 if chosen else 1))
        others = [absent[int(place)] for place in rng.permutation(len(absent))[:wanted]]
        labels = chosen + others
        labels = [labels[int(place)] for place in rng.permutation(len(labels))]
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
    if answer.unused:
        piece = answer.unused[0]
        raise DatasetError(
            f"{record.id}: {piece.text!r} in the answer is no object: {piece.reason}. Four "
            "locations and a label each, with ; between, fit. Correct the answer."
        )
    try:
        format_answer(answer.objects)
    except InvalidPromptError as e:
        raise DatasetError(f"{record.id}: {e}") from e
    return answer.objects


Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels
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

    def _draw(self, width: int, height: int, rng: np.random.Generator) -> Region:
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

    def _draw(self, width: int, height: int, rng: np.random.Generator) -> Region:
        for _ in range(100):  # as TensorFlow's sample_distorted_bounding_box
            area = rng.uniform(self.area, 1) * width * height
            ratio = math.exp(rng.uniform(-math.log(self.ratio), math.log(self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


def _crop(record: Record, visible: float, draw: Callable[[int, int], Region]) -> Record:
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


def _inside(thing: Box, part: Region, picture: Image.Image) -> tuple[Box | None, float]:
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


@dataclasses.dataclass(frozen=True)
class RandomAnswer:
    """Any of the answers, each as likely as it is often among them: big_vision's `choice`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, record.answers[int(rng.integers(len(record.answers)))])


@dataclasses.dataclass(frozen=True)
class CycleAnswers:
    """Another answer every epoch, until all have come: big_vision's `choice_no_replacement`.

    The order is random, and another one for each record.
    """

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        count = len(record.answers)
        if count < 2:
            return _only(record, record.suffix)
        return _only(record, record.answers[place_in_turn(record, count, self.seed)])


@dataclasses.dataclass(frozen=True)
class MostFrequentAnswer:
    """The answer that most annotators gave, of equals the first: big_vision's `majority`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, collections.Counter(record.answers).most_common(1)[0][0])


def place_in_turn(record: Record, count: int, seed: int) -> int:
    """Which of `count` things comes in the record's epoch, each once before any comes again."""
    # A new order for each round, by the record's name: nothing has to be remembered.
    turn, place = divmod(record.epoch, count)
    key = [seed, turn, zlib.crc32(record.id.encode("utf-8", "replace"))]
    return int(np.random.default_rng(key).permutation(count)[place])


def _only(record: Record, answer: str) -> Record:
    return dataclasses.replace(record, suffix=answer, answers=())


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
