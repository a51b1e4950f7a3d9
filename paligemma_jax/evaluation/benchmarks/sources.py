"""The rows of a benchmark's data, in whichever layout it is."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.coco_file import read_coco
from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.data.opening import coco_pictures, find_splits, open_source
from paligemma_jax.data.readers import Pictured
from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark, Row
from paligemma_jax.evaluation.benchmarks.builder_rows import builder_fields, builder_images
from paligemma_jax.evaluation.benchmarks.example import MadePicture, Picture
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.processing.image_source import ImageSource

_PICTURES = ("image", "images", "image_left", "image_right")
_USUAL = (
    "test",
    "",
    "validation",
    "valid",
    "val",
    "dev",
    "huggingface",
)  # what is measured, if nobody says


@dataclasses.dataclass(frozen=True)
class Line:
    """One question as the data has it; `place` names it in messages.

    `row` is what is wrong with it where it cannot be read. `folder` is that of its files.
    """

    place: str
    row: Row | Misfit
    pictures: tuple[Picture, ...] | Misfit
    folder: Path


def read_lines(benchmark: Benchmark, data: Path, split: str | None) -> Iterator[Line]:
    """The rows of a file or folder: JSON lines, COCO's or Roboflow's layout, a prepared tfds.

    A folder with the benchmark's own .jsonl is read as that. Of others it is the split of that
    name: if none is given test, or else validation. Raises DatasetError.
    """
    own = data / f"{benchmark.name}.jsonl" if data.is_dir() else data
    if own.is_file() and own.suffix != ".json":
        return _of_jsonl(own)
    splits = find_splits(data)
    if split is None:
        split = next((name for name in _USUAL if name in splits), None)
    if split is None:
        name = next(iter(splits))
        raise DatasetError(
            f"{data} has no split to measure by custom, but {', '.join(splits)}. Name one: "
            f"--split {name}"
        )
    if (data / "dataset_info.json").is_file():
        return _of_tfds(benchmark, data, split)
    if split not in splits:
        raise DatasetError(f"{data} has no split {split!r}. {', '.join(splits)} fits: --split NAME")
    place = splits[split]
    return _of_jsonl(place) if place.suffix == ".jsonl" else _of_coco(benchmark, place)


def is_known_layout(data: Path) -> bool:
    """Whether it is one of the layouts of `find_splits`, and no folder of plain JSON lines."""
    try:
        return not any(file.suffix == ".jsonl" and file.parent == data
                       for file in find_splits(data).values())  # fmt: skip
    except DatasetError:
        return False


def _of_jsonl(path: Path) -> Iterator[Line]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(
            f"{path} cannot be read: {e}. A text file in UTF-8 fits. Look with: file {path}"
        ) from e
    folder = ImageFolder(path.parent)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _parsed(line)
            pictures = row if isinstance(row, Misfit) else _named(folder, row)
            yield Line(f"{path.name}:{number}", row, pictures, folder.root)


def _parsed(line: str) -> Row | Misfit:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return Misfit(f"this is no JSON: {e}")
    if not isinstance(row, dict):
        return Misfit(f"this is a {type(row).__name__}, no object with fields")
    return row


def _named(folder: ImageFolder, row: Row) -> tuple[Picture, ...] | Misfit:
    names = row.get("images", [row["image"]] if "image" in row else None)
    if not isinstance(names, list) or not names:
        return Misfit("neither 'image' (a name) nor 'images' (a list of names) is there")
    try:
        return tuple(folder.path_of(name) for name in names)
    except DatasetError as e:
        return Misfit(str(e))


def _of_coco(benchmark: Benchmark, path: Path) -> Iterator[Line]:
    """Every picture is asked for all classes of the file; objects of a crowd are left out."""
    if benchmark.answer is not Answer.BOXES:
        raise DatasetError(
            f"{path} holds COCO's boxes, and {benchmark.name} asks for something else. A task of "
            "boxes fits. Measure: paligemma eval --task detection"
        )
    file = read_coco(path)
    folder = ImageFolder(coco_pictures(path) or path.parent)
    for picture in file.pictures:
        size = np.array([picture.width, picture.height] * 2)
        objects = [
            {"label": one.label, "box": (np.array(one.corners)[[1, 0, 3, 2]] * size).tolist()}
            for one in picture.objects
        ]
        row = {"id": picture.place, "labels": list(file.classes), "objects": objects}
        pictures = _named(folder, {"image": picture.name})
        yield Line(picture.place, row, pictures, folder.root)


@dataclasses.dataclass(frozen=True)
class _RowRecord(Record):
    row: Row = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _WholeRow(Pictured):
    """Keeps every column."""

    def __call__(self, row: Row, place: str) -> Record:
        images = builder_images(row)
        plain = {k: _plain(v) for k, v in row.items() if k not in _PICTURES}
        return _RowRecord(images, "", "", place, row=plain)


def _of_tfds(benchmark: Benchmark, path: Path, split: str) -> Iterator[Line]:
    source = open_source(path, split, reader=_WholeRow())
    for number in range(len(source)):
        place = f"{split}:{number}"
        try:
            record: Any = source[number]
        except DatasetError as e:
            yield Line(place, Misfit(str(e)), (), path)
            continue
        # Encoded pictures of a whole data set need not be in memory: they are read again.
        pictures = tuple(
            MadePicture(
                f"{place} {n}" if n else place, functools.partial(_image, source, number, n)
            )
            for n in range(len(record.images))
        )
        try:
            row: Row | Misfit = builder_fields(benchmark.name, record.row, path, split)
        except Misfit as e:
            row = e
        else:
            # Servers ask for the number of the question; another id may be a picture's.
            ids = (row[name] for name in ("question_id", "example_id", "id") if name in row)
            row = dict(row) | {"id": next(ids, place)}
        yield Line(place, row, pictures, path)


def _image(source: Any, number: int, place: int) -> ImageSource:
    return source[number].images[place]


def _plain(value: Any) -> Any:
    """As JSON would have it: lists, numbers, and text for bytes in UTF-8."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
