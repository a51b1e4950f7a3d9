"""One example of training data, and what gives them by number."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image_source import ImageSource


@dataclasses.dataclass(frozen=True)
class Record:
    """Pictures, a prompt, and the answer to learn.

    Attributes:
      images: what `load_image` takes, one entry a picture.
      prefix: the prompt, without the separating newline.
      suffix: the answer.
      id: names the record in reports, for example "train.jsonl:17".
      answers: all answers where there are several; `suffix` is the first. A transform such as
        `RandomAnswer` chooses, and empties this.
      size: width and height in pixels of the picture that locations refer to; None if not known.
        A picture of another size is an error.
      epoch: how often the source has been gone through before; the pipeline sets it.
    """

    images: tuple[ImageSource, ...]
    prefix: str
    suffix: str
    id: str
    answers: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    epoch: int = 0


# Changes a record; must be picklable and draw all its chance from the generator.
Transform = Callable[[Record, np.random.Generator], Record]


@runtime_checkable
class RecordSource(Protocol):
    """Records by number: any order, picklable, cheap to make.

    `source[i]` raises DatasetError, naming the place, for a record that cannot be read. A source
    may have `fingerprint() -> str`, which changes with its contents.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def fingerprint(source: RecordSource) -> str:
    """A short text that changes with the contents of `source`, as far as it can be told cheaply.

    A source without its own is told by its length and by 32 of its records, pictures left out.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return own()
    digest = hashlib.sha256(str(len(source)).encode())
    for index in sorted({round(i) for i in np.linspace(0, len(source) - 1, 32)}):
        try:
            record = source[index]
            parts = (record.id, record.prefix, record.suffix, *record.answers)
        except DatasetError as e:
            parts = (str(e),)
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def short_name(path: Path) -> str:
    """The name of a data file; with its folder, where the files of all splits share their name."""
    same = path.name in ("annotations.jsonl", "_annotations.coco.json") and path.parent.name
    return f"{path.parent.name}/{path.name}" if same else path.name


def check_number(index: int, length: int, what: object) -> int:
    """`index` from 0 up; a negative one counts from the end. Raises IndexError."""
    if not -length <= index < length:
        raise IndexError(f"Record {index} of {what}, which has {length} records.")
    return index % length
