"""The questions of a benchmark, checked before a model is asked.

One question of a benchmark.

The rows of a benchmark's data, in whichever layout it is.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.data.coco import read_coco
from paligemma_jax.data.readers import ImageColumns
from paligemma_jax.data.record import ImageFolder, Record
from paligemma_jax.data.sources import coco_image_folder, find_splits, open_source
from paligemma_jax.errors import DatasetError, InvalidImageError, InvalidPromptError
from paligemma_jax.evaluation.metric import Misfit, refuse
from paligemma_jax.evaluation.tasks import (
    Answer,
    Benchmark,
    Prompt,
    Row,
    builder_fields,
    builder_images,
    found_boxes,
    template,
    true_mask,
)
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.prompts import split_labels


@dataclasses.dataclass(frozen=True, eq=False)
class MadePicture:
    """A picture that `make` draws, or reads out of a data set, when it is needed."""

    name: str
    make: Callable[[], ImageSource]


Picture = Path | MadePicture


@dataclasses.dataclass(frozen=True)
class Example:
    """One question: its pictures, prompt and right answer; `row` is the line it is of.

    `answer` and `max_new_tokens` are the benchmark's where they are None.
    """

    id: str | int
    images: tuple[Picture, ...]
    prompt: str
    reference: Any
    row: Row
    answer: Answer | None = None
    max_new_tokens: int | None = None


def open_picture(picture: Picture) -> Image.Image:
    """Raises InvalidImageError for what cannot be read."""
    if not isinstance(picture, MadePicture):
        return load_image(picture)
    try:
        return load_image(picture.make())
    except DatasetError as e:
        raise InvalidImageError(f"{picture.name}: {e}") from e


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
    folder = ImageFolder(coco_image_folder(path) or path.parent)
    for picture in file.images:
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
class _WholeRow(ImageColumns):
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


def expected_files(benchmark: Benchmark) -> str:
    """Which files are expected, and what is in them."""
    line = json.dumps(dict(benchmark.example), ensure_ascii=False)
    masks = " Masks are in the same folder." if benchmark.answer is Answer.MASK else ""
    coco = ", a COCO file or folder" if benchmark.answer is Answer.BOXES else ""
    return (
        f"A folder with {benchmark.name}.jsonl (or a .jsonl file of any name), one line a question "
        f"such as\n  {line}\nand with the pictures that the lines name beside it.{masks}\nLines "
        'of {"image", "prefix", "suffix"} fit too where they have all that the figures need, and '
        f"so do Roboflow's folders of them{coco}, and a version of a data set that tfds prepared "
        "as array_record, with columns of these names or of big_vision's builder."
    )


def read_examples(
    benchmark: Benchmark,
    data: str | Path,
    *,
    limit: int | None = None,
    prompt: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """The questions of a file or folder (see `read_lines`); the first `limit` of them.

    `prompt` is a template such as "answer en {question}", instead of the benchmark's own. `split`
    is one of the folder's; test if not given, or else validation. Raises DatasetError that lists
    every row that does not fit, and says what is expected where the data is missing. Pictures are
    not opened, unless boxes are given as parts of them.
    """
    path = Path(data).expanduser()
    _check_there(benchmark, path)
    ask = template(prompt) if prompt is not None else None
    # The metric reads each reference before hours are spent on predictions.
    metric = benchmark.measured.make()
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str | int, str] = {}
    for line in read_lines(benchmark, path, split):
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = _example(benchmark, line, ask)
            metric._row(_any_prediction(benchmark), example.reference)
            if example.id in seen:
                raise Misfit(f"the id {example.id!r} is that of {seen[example.id]} too")
        except Misfit as e:
            problems.append(f"{line.place}: {e}")
            continue
        seen[example.id] = line.place
        examples.append(example)
    if problems or not examples:
        raise refuse(
            problems or [f"{path} has no lines"], expected_files(benchmark), "Mend these lines."
        )
    return examples


def _example(benchmark: Benchmark, line: Line, ask: Prompt | None) -> Example:
    if isinstance(line.row, Misfit):
        raise line.row
    row, whole_prompt = line.row, None
    if _is_training_row(benchmark, row):
        whole_prompt = row["prefix"]
        row = {"id": line.place} | dict(row)
    id = row.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise Misfit(f"the id is {id!r}; a text or a whole number that no other line has fits")
    if isinstance(line.pictures, Misfit):
        raise line.pictures
    if whole_prompt is not None:
        row = _from_training(benchmark, row, line.pictures)
    if benchmark.answer is Answer.MASK:
        reference: Any = true_mask(row, line.folder)
    else:
        reference = benchmark.reference(row)
    if ask is not None:
        prompt = ask(row)
    elif whole_prompt is not None and benchmark.answer is Answer.TEXT:
        prompt = whole_prompt
    else:
        prompt = benchmark.prompt(row)
    return Example(id, line.pictures, prompt, reference, row)


def _is_training_row(benchmark: Benchmark, row: Row) -> bool:
    """Whether it has a prompt and an answer as one trains with, and not the benchmark's fields."""
    needed = benchmark.example.keys() - {"id", "image", "images"}
    return isinstance(row.get("prefix"), str) and "suffix" in row and not needed <= row.keys()


def _from_training(benchmark: Benchmark, row: Row, pictures: tuple[Picture, ...]) -> Row:
    """With the fields of the benchmark, as far as prefix and suffix tell them."""
    suffix = row["suffix"]
    answers = suffix if isinstance(suffix, list) else [suffix]
    if benchmark.answer is Answer.BOXES:
        told: Mapping[str, Any] = _objects(row["prefix"], suffix, pictures[0])
    else:
        first = answers[0] if answers else None
        told = {"answer": first, "text": first, "answers": answers, "captions": answers}
    return dict(told) | dict(row)


def _objects(prefix: str, suffix: Any, picture: Picture) -> dict[str, Any]:
    try:
        labels = split_labels(prefix.removeprefix("detect "))
    except InvalidPromptError as e:
        raise Misfit(f"the prefix does not fit: {e}") from e
    if not isinstance(suffix, str):
        raise Misfit(f"the suffix is {suffix!r} of type {type(suffix).__name__}, no string")
    try:
        width, height = open_picture(picture).size
    except InvalidImageError:  # will be left out
        return {"labels": list(labels), "objects": []}
    found = Detections.from_text(suffix, width, height)
    objects = [{"label": one.label, "box": list(one.xyxy)} for one in found]
    return {"labels": list(labels), "objects": objects}


def _any_prediction(benchmark: Benchmark) -> Any:
    return {Answer.TEXT: "", Answer.MASK: None, Answer.BOXES: found_boxes(())}[benchmark.answer]


def _check_there(benchmark: Benchmark, data: Path) -> None:
    own = data / f"{benchmark.name}.jsonl" if data.is_dir() else data
    if own.is_file() or data.is_dir() and is_known_layout(data):
        return
    there = sorted(child.name for child in data.iterdir())[:8] if data.is_dir() else []
    listing = f" (there: {', '.join(there)})" if there else ""
    raise DatasetError(
        f"{own} is not there{listing}. {expected_files(benchmark)}\nSee: paligemma eval --list"
    )
