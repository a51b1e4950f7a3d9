"""The training record, what gives records by index, and what can be wrong with them."""

import dataclasses
import enum
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import ImageSource


@dataclasses.dataclass(frozen=True)
class Record:
    """Images, a prompt, and the answer to learn.

    Attributes:
      images: what `load_image` takes, one entry an image.
      prefix: the prompt, without the separating newline.
      suffix: the answer.
      id: names the record in reports, for example "train.jsonl:17".
      answers: all answers where there are several; `suffix` is the first. A transform such as
        `RandomAnswer` chooses one, and empties this.
      size: width and height in pixels of the image that locations refer to; None if not known. An
        image of another size is an error.
      epoch: how often the source was gone through before; the pipeline sets it.
    """

    images: tuple[ImageSource, ...]
    prefix: str
    suffix: str
    id: str
    answers: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    epoch: int = 0


# Changes a record; must be picklable and take all randomness from the generator.
Transform = Callable[[Record, np.random.Generator], Record]


@runtime_checkable
class RecordSource(Protocol):
    """Records by index: any order, picklable, cheap to make.

    `source[i]` raises DatasetError, naming the record, for one that cannot be read. A source may
    have `fingerprint() -> str`, which changes with its contents.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def fingerprint(source: RecordSource) -> str:
    """A short text that changes with the contents of `source`, as far as that is cheap to tell.

    A source without its own has that of its length and of 32 of its records without images.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return own()
    checksum = hashlib.sha256(str(len(source)).encode())
    for index in sorted({round(i) for i in np.linspace(0, len(source) - 1, 32)}):
        try:
            record = source[index]
            texts = (record.id, record.prefix, record.suffix, *record.answers)
        except DatasetError as e:
            texts = (str(e),)
        checksum.update(repr(texts).encode("utf-8", "surrogatepass"))
    return checksum.hexdigest()[:32]


def short_name(path: Path) -> str:
    """The name of a data file; with its folder, where the files of all splits share their name."""
    same = path.name in ("annotations.jsonl", "_annotations.coco.json") and path.parent.name
    return f"{path.parent.name}/{path.name}" if same else path.name


def check_index(index: int, length: int, source: object) -> int:
    """`index` from 0 up; a negative one counts from the end. Raises IndexError."""
    if not -length <= index < length:
        raise IndexError(f"Record {index} of {source}, which has {length} records.")
    return index % length


def shown(value: object) -> str:
    """A value for an error message, with its type, in at most 60 characters."""
    if value is None:
        return "null"
    return f"{str(value)[:40]!r} ({type(value).__name__})"


class ProblemKind(enum.Enum):
    """Kinds of problems; the value is their heading in a report."""

    UNREADABLE = "records that cannot be read"
    IMAGE = "missing or broken images"
    SIZE = "images of another size than their boxes"
    BOX = "boxes or masks that are malformed or out of range"
    LABEL = "labels that the prompt does not ask for"
    EMPTY = "empty answers"
    WHITESPACE = "prompts and answers with space or line breaks around them"
    BLANK = "blank lines, skipped"
    TOO_LONG = "texts that are too long"
    DUPLICATE = "duplicate records"
    SHARED = "images that are in more than one split"

    @property
    def stops_training(self) -> bool:
        """Whether training stops at such a record, unless it is told to skip."""
        return self.name in ("UNREADABLE", "IMAGE", "SIZE", "TOO_LONG")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: where it is, such as "train.jsonl:17", and what it is."""

    kind: ProblemKind
    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Turns names into paths below `root`; links that lead out of it are followed if `links`."""

    root: Path
    links: bool = False

    @classmethod
    def of(
        cls, images: "str | os.PathLike[str] | ImageFolder | None", default: Path
    ) -> "ImageFolder":
        """The folder that is given, or else the default one."""
        if isinstance(images, ImageFolder):
            return images
        return cls(default if images is None else Path(images).expanduser())

    def paths_of(self, value: Any) -> Any:
        """The path of a name, or those of a list of names; anything else as it is."""
        if isinstance(value, list):
            return [self.paths_of(entry) for entry in value]
        return self.path_of(value) if isinstance(value, str) else value

    def path_of(self, name: str) -> Path:
        """The path of an image, which need not exist; DatasetError for a name outside `root`."""
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise DatasetError(
                f"expected the name of an image file in {self.root}, got {name!r}. Write for "
                'example: "image": "cat.jpg"'
            )
        path = Path(os.path.normpath(self.root / name))
        inside = path.is_relative_to(os.path.normpath(self.root))
        if inside and not self.links:
            inside = path.resolve().is_relative_to(self.root.resolve())
        if not inside:
            raise DatasetError(
                f"the image {name!r} is outside of the folder {self.root}. If you trust the data, "
                "name a folder that holds all images: images=ImageFolder(Path('/'))"
            )
        return path
