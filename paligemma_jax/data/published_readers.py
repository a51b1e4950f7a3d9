"""Readers and a transform for the prompts that big_vision's transfer configurations write."""

import dataclasses
import re

import numpy as np
from PIL import Image

from paligemma_jax.data.readers import (
    Pictured,
    Reader,
    Row,
    column,
    images_in,
    record_of,
    text_in,
    texts_in,
)
from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError, PaliGemmaError
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.resample import resize_bilinear_antialias

_OPTIONS = re.compile(r"Options: (\(A\) .*)\nAnswer:", re.DOTALL)
_BETWEEN = re.compile(r", (?=\([A-Z]\) )")
_CHOSEN = re.compile(r"The answer is ([A-Z])\.")
_RED = (255, 0, 0)


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Pictured):
    """A question with choices, as A-OKVQA and AI2D were learnt; the answer is a choice's text.

    `answer` is a column with the text, or with the number of the choice from 0 up. The two spaces
    behind "answer en" and the tabs are big_vision's.
    """

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"

    def __call__(self, row: Row, place: str) -> Record:
        choices = texts_in(row, self.choices)
        prefix = f"answer en  {text_in(row, self.question)} choose from: {_tabbed(choices)}"
        answer = column(row, self.answer)
        if isinstance(answer, int | np.integer):
            answers = (choices[_checked(int(answer), choices, self.answer)],)
        else:
            answers = texts_in(row, self.answer)
        return record_of(images_in(row, self.image), prefix, answers, place)


@dataclasses.dataclass(frozen=True)
class ScienceQuestion(Pictured):
    """ScienceQA: question, hint (or "N/A") and lettered options; "The answer is B."

    `answer` is a column with the number of the choice from 0 up.
    """

    question: str = "question"
    hint: str = "hint"
    choices: str = "choices"
    answer: str = "answer"

    def __call__(self, row: Row, place: str) -> Record:
        choices = texts_in(row, self.choices)
        number = column(row, self.answer)
        if not isinstance(number, int | np.integer):
            raise DatasetError(f"{self.answer!r} is {number!r}. The number of a choice fits.")
        letter = _letter(_checked(int(number), choices, self.answer))
        hint = text_in(row, self.hint) or "N/A"
        prefix = (
            f"Question: {text_in(row, self.question)}\nContext: {hint}\n"
            f"Options: {_lettered(choices)}\nAnswer:"
        )
        return record_of(images_in(row, self.image), prefix, (f"The answer is {letter}.",), place)


@dataclasses.dataclass(frozen=True)
class ShuffleOptions:
    """The options of a `ScienceQuestion` in random order, with the letter of the answer."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        found, chosen = _OPTIONS.search(record.prefix), _CHOSEN.fullmatch(record.suffix)
        if found is None or chosen is None:
            return record
        options = [option[4:] for option in _BETWEEN.split(found[1])]
        order = rng.permutation(len(options)).tolist()
        letter = _letter(order.index(ord(chosen[1]) - ord("A")))
        start, end = found.span(1)
        shuffled = _lettered([options[place] for place in order])
        return dataclasses.replace(
            record,
            prefix=record.prefix[:start] + shuffled + record.prefix[end:],
            suffix=f"The answer is {letter}.",
        )


@dataclasses.dataclass(frozen=True)
class Outlined:
    """Records of another reader with a red box of one pixel, as WidgetCap shows what is meant.

    Attributes:
      reader: makes the records.
      size: pixels of the square that the picture is resized to first; the processor's.
      box: a column with y1, x1, y2, x2 as fractions of the picture.
    """

    reader: Reader
    size: int
    box: str = "bbox"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of pictures."""
        return self.reader.image_fields

    def __call__(self, row: Row, place: str) -> Record:
        record = self.reader(row, place)
        try:
            y1, x1, y2, x2 = (float(value) for value in column(row, self.box))
        except (TypeError, ValueError) as e:
            if isinstance(e, DatasetError):
                raise
            raise DatasetError(f"{self.box!r} is no box. Four fractions y1, x1, y2, x2 fit.") from e
        if not (0 <= y1 <= y2 <= 1 and 0 <= x1 <= x2 <= 1):
            raise DatasetError(
                f"{self.box!r} is {(y1, x1, y2, x2)}. y1 <= y2 and x1 <= x2, all from 0 to 1, fit. "
                "Divide pixels by the height and width of the picture."
            )
        try:
            pictures = [load_image(image) for image in record.images]
        except PaliGemmaError as e:
            raise DatasetError(str(e)) from e
        top, left, bottom, right = (int(v * (self.size - 1)) for v in (y1, x1, y2, x2))
        drawn = []
        for picture in pictures:
            resized = resize_bilinear_antialias(np.asarray(picture), self.size, self.size)
            pixels = np.clip(resized, 0, 255).astype(np.uint8)
            pixels[[top, bottom], left : right + 1] = _RED
            pixels[top : bottom + 1, [left, right]] = _RED
            drawn.append(Image.fromarray(pixels))
        return dataclasses.replace(record, images=tuple(drawn), size=None)


def _checked(number: int, choices: tuple[str, ...], name: str) -> int:
    if not 0 <= number < len(choices):
        raise DatasetError(
            f"{name!r} is {number}, and there are {len(choices)} choices. 0 to {len(choices) - 1} "
            "fits. Correct the record."
        )
    return number


def _tabbed(choices: tuple[str, ...]) -> str:
    return " \t ".join(choices)


def _lettered(choices: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"({_letter(place)}) {text}" for place, text in enumerate(choices))


def _letter(place: int) -> str:
    return chr(ord("A") + place)
