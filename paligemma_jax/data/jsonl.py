"""Records in JSON lines, as Roboflow, big_vision and others write them.

{"image": "cat.jpg", "prefix": "detect cat", "suffix": "<loc0364><loc0504><loc0806><loc0605> cat"}
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.data.problem import Kind, Problem
from paligemma_jax.data.readers import Fields, Reader
from paligemma_jax.data.record import Record, check_number, short_name
from paligemma_jax.errors import DatasetError

_BOM = b"\xef\xbb\xbf"


class JsonlSource:
    """The lines of a file, read when they are asked for; only where they begin is kept.

    Args:
      path: the file, in UTF-8. Blank lines are passed over, and counted in `blank_lines`.
      images: the folder that names of pictures refer to; the file's own if not given.
      reader: which fields a record is made of; "image", "prefix" and "suffix" if not given.

    Raises DatasetError for a file that cannot be read, has no lines, or is no text.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        reader: Reader | None = None,
    ):
        self.path = Path(path).expanduser()
        folder = self.path.parent if images is None else images
        self.images = folder if isinstance(folder, ImageFolder) else ImageFolder(Path(folder))
        self.reader = reader or Fields()
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self._scan(file)
        except OSError as e:
            raise DatasetError(
                f"The data file {self.path} cannot be read: {e.strerror}. A file with a JSON "
                f"object in each line fits. Look with: ls -l {self.path.parent}"
            ) from e
        if not len(self):
            raise DatasetError(
                f"The data file {self.path} has no records. At least one line with a JSON object "
                'fits, such as {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"}.'
            )

    def _scan(self, file: Any) -> None:
        starts, numbers, blank, position = [], [], [], 0
        digest = hashlib.sha256()
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DatasetError(
                        f"The data file {self.path} is in UTF-16. UTF-8 fits. Convert it, for "
                        f"example: iconv -f UTF-16 -t UTF-8 {self.path}"
                    )
                if line.startswith(_BOM):
                    position, line = len(_BOM), line[len(_BOM) :]
            digest.update(line)
            if line.strip():
                starts.append(position)
                numbers.append(number)
            else:
                blank.append(number)
            position += len(line)
        self._starts = np.array(starts, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.blank_lines: tuple[int, ...] = tuple(blank)
        self._digest = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), self.path)
        place = f"{short_name(self.path)}:{self._numbers[index]}"
        with self.path.open("rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DatasetError(
                    f"The data file {self.path} has changed since it was opened. A file that "
                    "stays as it is fits. Start again, or train on a copy."
                )
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return self.reader(self._with_paths(_object(line)), place)
        except DatasetError as e:
            raise DatasetError(f"{self.path}:{self._numbers[index]}: {e}") from e

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Blank lines: what is wrong with records is told when they are read."""
        return tuple(
            Problem(Kind.BLANK, f"{short_name(self.path)}:{number}", "the line is blank")
            for number in self.blank_lines
        )

    def fingerprint(self) -> str:
        """Of the file's contents."""
        return self._digest

    def __repr__(self) -> str:
        return f"JsonlSource({str(self.path)!r})"

    def _with_paths(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in self.reader.image_fields:
            value = row.get(name)
            if isinstance(value, str):
                row[name] = self.images.path_of(value)
            elif isinstance(value, list):
                row[name] = [self.images.path_of(entry) for entry in value]
        return row


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; raises DatasetError."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as e:
        raise DatasetError(
            f"the line is not UTF-8 at byte {e.start}. Text in UTF-8 fits. Save the file again."
        ) from e
    except (json.JSONDecodeError, RecursionError) as e:
        where = f" at character {e.pos}: {e.msg}" if isinstance(e, json.JSONDecodeError) else ""
        cut = "" if line.rstrip().endswith(b"}") else " The line seems to be cut short."
        raise DatasetError(
            f"the line is no JSON{where}.{cut} An object such as "
            '{"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"} fits. Mend the line.'
        ) from e
    if not isinstance(row, dict):
        raise DatasetError(
            f"the line holds {_kind(row)} instead of an object. "
            '{"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"} fits. Mend the line.'
        )
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DatasetError(
            f"the line gives {' and '.join(twice)} twice. Each field once fits. Mend the line."
        )
    return row


def _kind(value: Any) -> str:
    kinds: Mapping[type, str] = {list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number")


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
