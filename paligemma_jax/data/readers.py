"""Rows of any data set -> records: which columns hold what, and the prompt of the task.

A column inside another is named with a dot: "objects.bbox". Text may be bytes in UTF-8.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError, InvalidPromptError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.image_source import ImageSource

Row = Mapping[str, Any]


@runtime_checkable
class Reader(Protocol):
    """Makes a record of a row; raises DatasetError, which the source adds the place to."""

    @property
    def image_fields(self) -> tuple[str, ...]:
        """Columns that may hold the names of picture files."""
        ...

    def __call__(self, row: Row, place: str) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A reader of rows with pictures; `image` is their column, or a tuple of several."""

    image: str | tuple[str, ...] = "image"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of pictures."""
        return (self.image,) if isinstance(self.image, str) else self.image


@dataclasses.dataclass(frozen=True)
class Fields(Pictured):
    """Rows that hold the prompt and the answer; a list of answers gives `Record.answers`.

    A list of pictures under `image`, or under its plural, gives several for one prompt. Also for
    data whose question is the whole prompt: Fields(prefix="question", suffix="answers").
    """

    prefix: str = "prefix"
    suffix: str = "suffix"
    id: str = "id"

    @property
    def image_fields(self) -> tuple[str, ...]:
        named = super().image_fields
        return (*named, *(f"{name}s" for name in named))

    def __call__(self, row: Row, place: str) -> Record:
        name = self.image
        if isinstance(name, str) and name not in row and f"{name}s" in row:
            name = f"{name}s"
        given = row.get(self.id)
        number = isinstance(given, int | np.integer) and not isinstance(given, bool)
        known = str(given) if number or (isinstance(given, str) and given) else place
        return record_of(
            images_in(row, name), text_in(row, self.prefix), texts_in(row, self.suffix), known
        )


@dataclasses.dataclass(frozen=True)
class Caption(Pictured):
    """`caption en`; `text` is a column with one caption or several."""

    text: str = "caption"
    language: str = "en"

    def __call__(self, row: Row, place: str) -> Record:
        prefix = prompts.caption(self.language)
        return record_of(images_in(row, self.image), prefix, texts_in(row, self.text), place)


@dataclasses.dataclass(frozen=True)
class Answer(Pictured):
    """`answer en ...`; `answers` is a column with one answer or several, or with a number."""

    question: str = "question"
    answers: str = "answer"
    language: str = "en"

    def __call__(self, row: Row, place: str) -> Record:
        question = text_in(row, self.question)
        try:
            prompts.answer(question, self.language)
        except InvalidPromptError as e:
            raise DatasetError(f"{self.question}: {e}") from e
        # As it stands, spaces at its ends too: so were the published models trained.
        prefix = f"answer {self.language} {question}"
        number = column(row, self.answers)
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        answers = (str(number),) if whole else texts_in(row, self.answers)
        return record_of(images_in(row, self.image), prefix, answers, place)


@dataclasses.dataclass(frozen=True)
class Ocr(Pictured):
    """`ocr`; `text` is a column with what can be read."""

    text: str = "text"

    def __call__(self, row: Row, place: str) -> Record:
        prefix = prompts.ocr()
        return record_of(images_in(row, self.image), prefix, texts_in(row, self.text), place)


def column(row: Row, name: str) -> Any:
    """The value of a column; a list where a list of rows is on the way. Raises DatasetError."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = [column(entry, part) for entry in value]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and not value:
            return []
        else:
            keys = ", ".join(map(str, row)) or "nothing"
            raise DatasetError(
                f"the field {name!r} is missing; there is {keys}. Every record needs it. Add it, "
                "or name the fields you have, for example: reader=Fields(prefix='question')"
            )
    return value


def images_in(row: Row, name: str | tuple[str, ...]) -> tuple[ImageSource, ...]:
    """One picture or several, of one column or several; raises DatasetError for none."""
    if not isinstance(name, str):
        return tuple(image for one in name for image in images_in(row, one))
    value = column(row, name)
    if isinstance(value, np.ndarray) and (value.ndim == 4 or value.dtype == object):
        value = list(value)  # frames, or pictures that are encoded
    several = isinstance(value, list | tuple)
    images = tuple(_image(entry) for entry in (value if several else [value]))
    if not images or any(image is None for image in images):
        raise DatasetError(
            f"{name!r} is {'null' if images else 'an empty list'}. A picture, or a list of "
            "pictures, fits. Leave the record out, or name its picture."
        )
    return images


def text_in(row: Row, name: str) -> str:
    """One text; raises DatasetError for anything else."""
    return _text(column(row, name), name)


def texts_in(row: Row, name: str) -> tuple[str, ...]:
    """One text or several; raises DatasetError for an empty list and for anything else."""
    return texts_of(column(row, name), name)


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a value of the column `name`; raises DatasetError as `texts_in`."""
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, list | tuple):
        return (_text(value, name),)
    if not value:
        raise DatasetError(
            f"{name!r} is an empty list. At least one text fits. Leave the record out, or add one."
        )
    return tuple(_text(entry, name) for entry in value)


def record_of(
    images: tuple[ImageSource, ...], prefix: str, answers: tuple[str, ...], place: str
) -> Record:
    """A record of one answer or several."""
    suffix = answers[0]
    kept = answers if len(answers) > 1 else ()
    return Record(images=images, prefix=prefix, suffix=suffix, id=place, answers=kept)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bytes | np.bytes_):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as e:
            raise DatasetError(f"{name!r} is not UTF-8. Text in UTF-8 fits.") from e
    if not isinstance(value, str):
        raise DatasetError(
            f"{name!r} is {_shown(value)}. A text fits. Write it in quotation marks, or correct it."
        )
    return str(value)


def _image(value: Any) -> Any:
    """A picture as `load_image` takes it; Hugging Face keeps files as {"bytes", "path"}."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return value.get("bytes") or value.get("path")
    if isinstance(value, np.bytes_):
        return bytes(value)
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
