"""Readers: an example of any data set -> a record; which columns hold what.

An example is a mapping, such as a row of a table. A column inside another is named with a dot:
"objects.bbox". Text may be bytes in UTF-8.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.data.record import Record, shown
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import ImageSource

Example = Mapping[str, Any]


@runtime_checkable
class Reader(Protocol):
    """Makes a record of an example; raises DatasetError, to which the source adds the place."""

    @property
    def image_fields(self) -> tuple[str, ...]:
        """Columns that may hold the names of image files."""
        ...

    def __call__(self, example: Example, record_id: str, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class ImageColumns:
    """Base of readers of examples with images; `image` is their column, or a tuple of several."""

    image: str | tuple[str, ...] = dataclasses.field(default="image", kw_only=True)

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of images."""
        return (self.image,) if isinstance(self.image, str) else self.image


@dataclasses.dataclass(frozen=True)
class Fields(ImageColumns):
    """Examples that hold the prompt and the answer; a list of answers gives `Record.answers`.

    A list of images under `image`, or under its plural, gives several for one prompt. Also for
    data whose question is the whole prompt: Fields(prefix="question", suffix="answers").
    """

    prefix: str = "prefix"
    suffix: str = "suffix"
    id: str = "id"

    @property
    def image_fields(self) -> tuple[str, ...]:
        named = super().image_fields
        return (*named, *(f"{name}s" for name in named))

    def __call__(self, example: Example, record_id: str) -> Record:
        name = self.image
        if isinstance(name, str) and name not in example and f"{name}s" in example:
            name = f"{name}s"
        given = example.get(self.id)
        known = is_whole(given) or (isinstance(given, str) and given)
        prefix, answers = text_in(example, self.prefix), texts_in(example, self.suffix)
        return record_of(
            images_in(example, name), prefix, answers, str(given) if known else record_id
        )


_OPTIONS = re.compile(r"Options: (\(A\) .*)\nAnswer:", re.DOTALL)
_BETWEEN = re.compile(r", (?=\([A-Z]\) )")
_CHOSEN = re.compile(r"The answer is ([A-Z])\.")


@dataclasses.dataclass(frozen=True)
class ShuffleOptions:
    """A transform: the options of a question of ScienceQA in random order."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        found, chosen = _OPTIONS.search(record.prefix), _CHOSEN.fullmatch(record.suffix)
        if found is None or chosen is None:
            return record
        options = [option[4:] for option in _BETWEEN.split(found[1])]
        order = rng.permutation(len(options)).tolist()
        letter = _letter(order.index(ord(chosen[1]) - ord("A")))
        start, end = found.span(1)
        shuffled = ", ".join(f"({_letter(number)}) {options[i]}" for number, i in enumerate(order))
        return dataclasses.replace(
            record,
            prefix=record.prefix[:start] + shuffled + record.prefix[end:],
            suffix=f"The answer is {letter}.",
        )


def column(example: Example, name: str) -> Any:
    """The value of a column; a list where a list of mappings is on the way. Raises DatasetError."""
    value: Any = example
    for key in name.split("."):
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = [column(entry, key) for entry in value]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list | tuple) and not value:
            return []
        else:
            raise DatasetError(
                f"the field {name!r} is missing, got {', '.join(map(str, example)) or 'nothing'}. "
                "Name the fields you have, for example: reader=Fields(prefix='question')"
            )
    return value


def images_in(example: Example, name: str | tuple[str, ...]) -> tuple[ImageSource, ...]:
    """One image or several, of one column or several; raises DatasetError for none."""
    if not isinstance(name, str):
        return tuple(image for one in name for image in images_in(example, one))
    value = column(example, name)
    if isinstance(value, np.ndarray) and (value.ndim == 4 or value.dtype == object):
        value = list(value)  # frames, or images that are encoded
    several = isinstance(value, list | tuple)
    images = tuple(_image(entry) for entry in (value if several else [value]))
    if not images or any(image is None for image in images):
        got = "null" if images else "an empty list"
        raise DatasetError(f"{name!r}: expected an image or a list of images, got {got}")
    return images


def text_in(example: Example, name: str) -> str:
    """One text; raises DatasetError for anything else."""
    return _text(column(example, name), name)


def texts_in(example: Example, name: str) -> tuple[str, ...]:
    """One text or several; raises DatasetError for an empty list and for anything else."""
    return texts_of(column(example, name), name)


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a value of the column `name`; raises DatasetError as `texts_in`."""
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, list | tuple):
        return (_text(value, name),)
    if not value:
        raise DatasetError(f"{name!r}: expected a text or a list of texts, got an empty list")
    return tuple(_text(entry, name) for entry in value)


def record_of(
    images: tuple[ImageSource, ...], prefix: str, answers: tuple[str, ...], record_id: str
) -> Record:
    """A record of one answer or several."""
    several = len(answers) > 1
    return Record(images, prefix, answers[0], record_id, answers=answers if several else ())


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bytes | np.bytes_):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as e:
            raise DatasetError(f"{name!r} is not UTF-8") from e
    if not isinstance(value, str):
        raise DatasetError(f"{name!r}: expected a text, got {shown(value)}")
    return str(value)


def _image(value: Any) -> Any:
    """An image as `load_image` takes it; Hugging Face keeps files as {"bytes", "path"}."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return value.get("bytes") or value.get("path")
    return bytes(value) if isinstance(value, np.bytes_) else value
