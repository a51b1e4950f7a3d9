"""The examples of a task, read from JSON lines, COCO files or prepared data sets of tfds, and
checked before a model is run.
"""

import contextlib
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
from paligemma_jax.data.record import ImageFolder, Record, RecordSource
from paligemma_jax.data.sources import JsonlSource, coco_image_folder, find_splits, open_source
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
      fields: as they were read.
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


# Reads one example: its place for messages, its fields, its images, and the folder of its files.
# Raises DatasetError, naming the place.
_Load = Callable[[], tuple[str, Fields, tuple[ImageRef, ...], Path]]


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
    for load in _open(task, path, split):
        if limit is not None and len(examples) >= limit:
            break
        place = ""
        try:
            place, fields, images, folder = load()
            example = _example(task, place, fields, images, folder, prompt)
            # The metric reads each reference before hours are spent on predictions.
            metric._keep(nothing, example.reference)
            if example.id in seen:
                raise InvalidExample(f"the id {example.id!r} is that of {seen[example.id]} too")
        except (DatasetError, InvalidPromptError) as e:
            problems.append(f"{place}: {e}" if place else str(e))
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
    fields: Fields,
    images: tuple[ImageRef, ...],
    folder: Path,
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


def _open(task: EvaluationTask, data: Path, split: str | None) -> Iterator[_Load]:
    own = data / f"{task.name}.jsonl" if data.is_dir() else data
    if own.is_file() and own.suffix != ".json":
        return _records(task, JsonlSource(own, reader=_WholeExample()), own.parent)
    splits: Mapping[str, Path] = {}
    with contextlib.suppress(DatasetError):
        splits = find_splits(data)
    if any(file.suffix == ".jsonl" and file.parent == data for file in splits.values()):
        splits = {}  # plain JSON lines, but not the task's
    if not splits:
        inside = sorted(child.name for child in data.iterdir())[:8] if data.is_dir() else []
        listing = f" (there: {', '.join(inside)})" if inside else ""
        raise DatasetError(
            f"{own} is missing{listing}. Expected: {expected_files(task)}\nSee: paligemma eval "
            "--list"
        )
    name = split or next((name for name in _SPLITS if name in splits), None)
    if name is None:
        raise DatasetError(
            f"{data} has no test or validation split, but {', '.join(splits)}. Name one: "
            f"--split {next(iter(splits))}"
        )
    if (data / "dataset_info.json").is_file():
        return _records(task, open_source(data, name, reader=_WholeExample()), data, name)
    if name not in splits:
        raise DatasetError(f"{data} has no split {name!r}. Its splits: {', '.join(splits)}")
    file = splits[name]
    if file.suffix == ".jsonl":
        return _records(task, JsonlSource(file, reader=_WholeExample()), file.parent)
    return _coco(task, file)


@dataclasses.dataclass(frozen=True)
class _FieldsRecord(Record):
    fields: Fields = dataclasses.field(default_factory=dict)


class _WholeExample:
    """A reader that keeps every field."""

    image_fields = IMAGE_FIELDS

    def __call__(self, example: Fields, place: str) -> Record:
        plain = {k: _plain(v) for k, v in example.items() if k not in IMAGE_FIELDS}
        return _FieldsRecord(images_of(example), "", "", place, fields=plain)


def _plain(value: Any) -> Any:
    """As JSON would have it: lists, numbers, and text for bytes in UTF-8."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _records(
    task: EvaluationTask, source: RecordSource, folder: Path, split: str = ""
) -> Iterator[_Load]:
    """Of JSON lines; with `split`, of a data set of tfds."""

    def load(number: int) -> Any:
        record: Any = source[number]
        fields = task.task.fields(record.fields)
        if not split:
            return record.id, fields, record.images, folder
        # Encoded images of a whole data set need not be in memory: they are read again.
        images = tuple(
            LazyImage(f"{record.id} {n}", lambda n=n: source[number].images[n])
            for n in range(len(record.images))
        )
        fields = dict(_tfds_fields(task.name, fields, folder, split))
        # Servers ask for the number of the question; another id may be an image's.
        ids = (fields[name] for name in ("question_id", "example_id", "id") if name in fields)
        return record.id, fields | {"id": next(ids, record.id)}, images, folder

    return (functools.partial(load, number) for number in range(len(source)))


def _coco(task: EvaluationTask, path: Path) -> Iterator[_Load]:
    """Every image is asked for all classes of the file; objects of a crowd are not read."""
    if task.output != "boxes":
        raise DatasetError(
            f"{path} holds COCO's boxes, and {task.name} needs other data. To score boxes: "
            "paligemma eval --task detection"
        )
    file = read_coco(path)
    folder = ImageFolder(coco_image_folder(path) or path.parent)

    def load(one: Any) -> Any:
        size = np.array([one.width, one.height] * 2)
        objects = [
            {"label": thing.label, "box": (np.array(thing.corners)[[1, 0, 3, 2]] * size).tolist()}
            for thing in one.objects
        ]
        fields = {"id": one.where, "labels": list(file.classes), "objects": objects}
        return one.where, fields, (folder.path_of(one.name),), folder.root

    return (functools.partial(load, one) for one in file.images)


def _tfds_fields(name: str, fields: Fields, directory: Path, split: str) -> Fields:
    """With the groups that no column names, and the one object of an example of RefCOCO."""
    if name == "tallyqa" and "issimple" in fields:
        return {**fields, "difficulty": "simple" if fields["issimple"] == 1 else "complex"}
    if name in ("chartqa", "pope") and "split" not in fields:
        return {**fields, "split": directory.parent.name.removeprefix("pope_")}
    if name == "xgqa" and "language" not in fields:
        return {**fields, "language": split.rpartition("_")[2]}
    if name.endswith("_seg") and "objects" in fields:
        return {**fields, **_referred(fields)}
    return fields


def _referred(fields: Fields) -> Fields:
    """Of an example with one object and one expression, as the splits named _flat have."""
    masks, boxes = list(column(fields, "objects.mask")), list(column(fields, "objects.bbox"))
    names = [texts_of(one, "sentence") for one in column(fields, "objects.refs.sentence")]
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
        "question_id": int(column(fields, "objects.refs.id")[0][0]),
    }
