"""One example of training data, and what gives them by number.

What can be wrong with data, and where.

Pictures that a data file names: files in one folder, and nothing outside it.
"""

import dataclasses
import enum
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import ImageSource


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


class ProblemKind(enum.Enum):
    """Kinds of problems; the value is their heading in a report."""

    UNREADABLE = "records that cannot be read"
    PICTURE = "pictures that are missing or broken"
    SIZE = "pictures of another size than their boxes"
    BOX = "boxes or masks that are none, or leave the picture"
    LABEL = "labels that the prompt does not ask for"
    EMPTY = "empty answers"
    TEXT = "prompts and answers with space or line breaks around them"
    BLANK = "blank lines, passed over"
    LONG = "texts that do not fit"
    REPEATED = "records that come more than once"
    SHARED = "pictures that are in more than one split"

    @property
    def stops_training(self) -> bool:
        """Whether training stops at such a record, unless it is told to skip."""
        return self in (
            ProblemKind.UNREADABLE,
            ProblemKind.PICTURE,
            ProblemKind.SIZE,
            ProblemKind.LONG,
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: where it is, such as "train.jsonl:17", and what it is."""

    kind: ProblemKind
    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Turns names into paths below `root`; links that lead out of it are followed if `links`."""

    root: Path
    links: bool = False

    def path_of(self, name: str) -> Path:
        """The path of a picture; raises DatasetError for a name that leads out of the folder.

        Whether there is such a file is not looked at.
        """
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise DatasetError(
                f"The picture {name!r} has no name. The name of a file in {self.root} fits. "
                'Write for example: "image": "cat.jpg"'
            )
        path = Path(os.path.normpath(self.root / name))
        inside = path.is_relative_to(os.path.normpath(self.root))
        if inside and not self.links:
            inside = path.resolve().is_relative_to(self.root.resolve())
        if not inside:
            raise DatasetError(
                f"The picture {name!r} leads out of the folder {self.root}. Files in it fit. "
                "If you trust the data, name a folder that holds all: images=ImageFolder(Path('/'))"
            )
        return path
