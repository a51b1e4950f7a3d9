"""The examples of a task, read from JSON lines, COCO files or prepared data sets of tfds, and
checked before a model is run.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.data.coco import read_coco
from paligemma_jax.data.readers import column, texts_of
from paligemma_jax.data.record import ImageFolder, Record
from paligemma_jax.data.sources import coco_image_folder, find_splits, open_source
from paligemma_jax.data.tasks import IMAGE_FIELDS, fill, images_of
from paligemma_jax.errors import (
    DatasetError,
    InvalidImageError,
    InvalidMaskError,
    InvalidPromptError,
)
from paligemma_jax.evaluation.detection_metrics import FoundBoxes
from paligemma_jax.evaluation.metric import InvalidExample, check_text, data_error
from paligemma_jax.evaluation.tasks import EvaluationTask, Fields, Output
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.masks import RLE, load_mask
from paligemma_jax.processing.prompts import split_labels

_SPLITS = ("test", "", "validation", "valid", "val", "dev", "huggingface")  # in order of preference


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImage:
    """An image that `load` draws, or reads out of a data set, when it is needed."""

    name: str
    load: Callable[[], ImageSource]


ImageRef = Path | LazyImage


@dataclasses.dataclass(frozen=True)
class Example:
    """One question: its images, prompt and right answer.

    Attributes:
      id: unlike that of any other.
      images: opened when they are needed.
      prompt, reference: what is asked, and what is right, as the metric takes it.
      fields: of the line or row it was read from.
      groups, unit: as `Metric.add` takes them.
      output, max_new_tokens: the task's where they are None.
    """

    id: str | int
    images: tuple[ImageRef, ...]
    prompt: str
    reference: Any
    fields: Fields
    groups: tuple[str, ...] = ()
    unit: Hashable = None
    output: Output | None = None
    max_new_tokens: int | None = None


def open_image(image: ImageRef) -> Image.Image:
    """Raises InvalidImageError for what cannot be read."""
    if not isinstance(image, LazyImage):
        return load_image(image)
    try:
        return load_image(image.load())
    except DatasetError as e:
        raise InvalidImageError(f"{image.name}: {e}") from e


# Fields and images of one example; the loader raises DatasetError for what cannot be read.
_Loaded = tuple[Fields, tuple[ImageRef, ...]]
_Line = tuple[str, Path, Callable[[], _Loaded]]  # its place for messages, the folder of its files


def read_examples(
    task: EvaluationTask,
    data: str | Path,
    *,
    limit: int | None = None,
    prompt: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """The examples of a file or folder.

    A folder with the task's own .jsonl is read as that. Of others (COCO's or Roboflow's layout, a
    data set that tfds prepared) it is the split of that name: test if none is given, or else
    validation. Images are not opened, unless boxes are given as fractions of them.

    Args:
      task: one of `TASKS`.
      data: where it is.
      limit: only the first so many.
      prompt: a template such as "answer en {question}", instead of the task's own.
      split: one of the folder's.

    Raises DatasetError that lists every invalid example, or says what is expected where the data
    is missing.
    """
    path = Path(data).expanduser()
    metric = task.metric()
    nothing = {"text": "", "mask": None, "boxes": FoundBoxes((), (), ())}[task.output]
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str | int, str] = {}
    for place, folder, load in _read_lines(task, path, split):
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = _example(task, place, folder, *load(), prompt)
            # The metric reads each reference before hours are spent on predictions.
            metric._keep(nothing, example.reference)
            if example.id in seen:
                raise InvalidExample(f"the id {example.id!r} is that of {seen[example.id]} too")
        except (DatasetError, InvalidPromptError) as e:
            problems.append(f"{place}: {e}")
            continue
        seen[example.id] = place
        examples.append(example)
    if problems or not examples:
        problems = problems or [f"{path} has no lines"]
        raise data_error(problems, f"Expected: {expected_files(task)}", "Correct these lines.")
    return examples


def expected_files(task: EvaluationTask) -> str:
    """Which files are expected, and what is in them."""
    line = json.dumps(dict(task.example), ensure_ascii=False)
    masks = " Masks are in the same folder." if task.output == "mask" else ""
    coco = ", a COCO file or folder" if task.output == "boxes" else ""
    return (
        f"a folder with {task.name}.jsonl (or a .jsonl file of any name), one example a line such "
        f"as\n  {line}\nand with the images that the lines name beside it.{masks}\nAlso lines of "
        '{"image", "prefix", "suffix"} where they have all that the scores need, Roboflow\'s '
        f"folders of them{coco}, and a version of a data set that tfds prepared as array_record, "
        "with columns of these names or of big_vision's builder."
    )


def _example(
    task: EvaluationTask,
    place: str,
    folder: Path,
    fields: Fields,
    images: tuple[ImageRef, ...],
    template: str | None,
) -> Example:
    prompt = None
    needed = task.example.keys() - {"id", "image", "images"}
    if isinstance(fields.get("prefix"), str) and "suffix" in fields and not needed <= fields.keys():
        # A line of training data; its prefix is the whole prompt.
        prompt = fields["prefix"] if task.output == "text" else None
        fields = {"id": place, **_from_training(task, fields, images), **fields}
    id = fields.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise InvalidExample(f"expected a text or whole number that no other line has, got id {id}")
    groups = (check_text(fields.get(task.group), task.group),) if task.group else ()
    reference = task.reference(task.task, fields, folder)
    if template is not None:
        prompt = fill(template, fields)
    return Example(id, images, prompt or task.task.prompt_of(fields), reference, fields, groups)


def _from_training(task: EvaluationTask, fields: Fields, images: tuple[ImageRef, ...]) -> Fields:
    """The fields of the task, as far as prefix and suffix tell them."""
    suffix = fields["suffix"]
    answers = suffix if isinstance(suffix, list) else [suffix]
    if task.output != "boxes":
        first = answers[0] if answers else None
        return {"answer": first, "text": first, "answers": answers, "captions": answers}
    labels = list(split_labels(fields["prefix"].removeprefix("detect ")))
    try:
        width, height = open_image(images[0]).size
    except InvalidImageError:  # will be skipped
        return {"labels": labels, "objects": []}
    found = Detections.from_text(check_text(suffix, "suffix"), width, height)
    return {"labels": labels, "objects": [{"label": one.label, "box": one.xyxy} for one in found]}


def _read_lines(task: EvaluationTask, data: Path, split: str | None) -> Iterator[_Line]:
    own = data / f"{task.name}.jsonl" if data.is_dir() else data
    if own.is_file() and own.suffix != ".json":
        return _jsonl(own)
    splits: Mapping[str, Path] = {}
    if data.exists():
        try:
            splits = find_splits(data)
        except DatasetError:
            pass
        if any(file.suffix == ".jsonl" and file.parent == data for file in splits.values()):
            splits = {}  # plain JSON lines, but not the task's
    if not splits:
        inside = sorted(child.name for child in data.iterdir())[:8] if data.is_dir() else []
        listing = f" (there: {', '.join(inside)})" if inside else ""
        raise DatasetError(
            f"{own} is missing{listing}. Expected: {expected_files(task)}\nSee: paligemma eval "
            "--list"
        )
    if split is None:
        split = next((name for name in _SPLITS if name in splits), None)
        if split is None:
            raise DatasetError(
                f"{data} has no test or validation split, but {', '.join(splits)}. Name one: "
                f"--split {next(iter(splits))}"
            )
    if (data / "dataset_info.json").is_file():
        return _tfds(task, data, split)
    if split not in splits:
        raise DatasetError(f"{data} has no split {split!r}. Its splits: {', '.join(splits)}")
    file = splits[split]
    return _jsonl(file) if file.suffix == ".jsonl" else _coco(task, file)


def _jsonl(path: Path) -> Iterator[_Line]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(f"{path} cannot be read as UTF-8: {e}") from e
    folder = ImageFolder(path.parent)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path.name}:{number}", folder.root, functools.partial(_json, line, folder)


def _json(line: str, folder: ImageFolder) -> _Loaded:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InvalidExample(f"this is not JSON: {e}") from e
    if not isinstance(fields, dict):
        raise InvalidExample(f"expected an object with fields, got a {type(fields).__name__}")
    names = fields.get("images", [fields["image"]] if "image" in fields else None)
    if not isinstance(names, list) or not names:
        raise InvalidExample("expected an 'image' (a name) or 'images' (a list of names)")
    return fields, tuple(folder.path_of(name) for name in names)


def _coco(task: EvaluationTask, path: Path) -> Iterator[_Line]:
    """Every image is asked for all classes of the file; objects of a crowd are not read."""
    if task.output != "boxes":
        raise DatasetError(
            f"{path} holds COCO's boxes, and {task.name} needs other data. To score boxes: "
            "paligemma eval --task detection"
        )
    file = read_coco(path)
    folder = ImageFolder(coco_image_folder(path) or path.parent)
    for one in file.images:
        size = np.array([one.width, one.height] * 2)
        objects = [
            {"label": thing.label, "box": (np.array(thing.corners)[[1, 0, 3, 2]] * size).tolist()}
            for thing in one.objects
        ]
        fields = {"id": one.place, "labels": list(file.classes), "objects": objects}
        images = functools.partial(folder.path_of, one.name)
        yield one.place, folder.root, lambda f=fields, image=images: (f, (image(),))


@dataclasses.dataclass(frozen=True)
class _RowRecord(Record):
    row: Fields = dataclasses.field(default_factory=dict)


class _WholeRow:
    """A reader that keeps every column."""

    image_fields = IMAGE_FIELDS

    def __call__(self, row: Fields, place: str) -> Record:
        plain = {k: _plain(v) for k, v in row.items() if k not in IMAGE_FIELDS}
        return _RowRecord(images_of(row), "", "", place, row=plain)


def _plain(value: Any) -> Any:
    """As JSON would have it: lists, numbers, and text for bytes in UTF-8."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _tfds(task: EvaluationTask, path: Path, split: str) -> Iterator[_Line]:
    source = open_source(path, split, reader=_WholeRow())

    def load(number: int) -> _Loaded:
        record: Any = source[number]
        place = f"{split}:{number}"
        # Encoded images of a whole data set need not be in memory: they are read again.
        images = tuple(
            LazyImage(
                f"{place} {n}" if n else place, lambda number=number, n=n: source[number].images[n]
            )
            for n in range(len(record.images))
        )
        fields = dict(_tfds_fields(task.name, task.task.fields(record.row), path, split))
        # Servers ask for the number of the question; another id may be an image's.
        ids = (fields[name] for name in ("question_id", "example_id", "id") if name in fields)
        return fields | {"id": next(ids, place)}, images

    for number in range(len(source)):
        yield f"{split}:{number}", path, functools.partial(load, number)


def _tfds_fields(name: str, row: Fields, directory: Path, split: str) -> Fields:
    """With the groups that no column names, and the one object of a row of RefCOCO."""
    if name == "tallyqa" and "issimple" in row:
        return {**row, "difficulty": "simple" if row["issimple"] == 1 else "complex"}
    if name in ("chartqa", "pope") and "split" not in row:
        return {**row, "split": directory.parent.name.removeprefix("pope_")}
    if name == "xgqa" and "language" not in row:
        return {**row, "language": split.rpartition("_")[2]}
    if name.endswith("_seg") and "objects" in row:
        return {**row, **_referred(row)}
    return row


def _referred(row: Fields) -> Fields:
    """Of a row with one object and one expression, as the splits named _flat have."""
    masks, boxes = list(column(row, "objects.mask")), list(column(row, "objects.bbox"))
    names = [texts_of(one, "sentence") for one in column(row, "objects.refs.sentence")]
    if len(masks) != 1 or len(names[0]) != 1:
        raise InvalidExample(
            f"expected one object with one expression, got {len(masks)} objects. Use the splits "
            "validation_flat, testA_flat, ..."
        )
    try:
        with Image.open(io.BytesIO(masks[0])) as image:
            mask = load_mask(np.asarray(image))
    except (OSError, TypeError, InvalidMaskError) as e:
        raise InvalidExample(f"the mask cannot be read: {e}") from e
    height, width = mask.shape
    y1, x1, y2, x2 = (float(value) for value in boxes[0])
    return {
        "expression": names[0][0],
        "segmentation": RLE.from_mask(mask).to_coco(),
        "size": [height, width],
        "box": [x1 * width, y1 * height, x2 * width, y2 * height],
        "objects": None,
        "question_id": int(column(row, "objects.refs.id")[0][0]),
    }
