"""COCO annotations -> records that ask for all classes of the file in every picture.

COCO's annotation files: pictures with objects, boxes in pixels, masks as polygons or runs.

The masks of a COCO file -> mask codes, many at a time, kept in a file for the next time.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.data.readers import Corners, box_corners, clip
from paligemma_jax.data.record import (
    ImageFolder,
    Problem,
    ProblemKind,
    Record,
    check_number,
    short_name,
)
from paligemma_jax.errors import DatasetError, InvalidMaskError, InvalidPromptError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.location_tokens import Box, format_answer
from paligemma_jax.processing.masks import MaskCodec, encode_masks, mask_from_coco
from paligemma_jax.processing.prompts import split_labels


@dataclasses.dataclass(frozen=True)
class CocoObject:
    """An object: its class, its box clipped to the picture, and its mask as it is written."""

    place: str
    label: str
    corners: Corners
    segmentation: Any


@dataclasses.dataclass(frozen=True)
class CocoPicture:
    """A picture of width x height pixels and its objects, in the file's order."""

    place: str
    name: str
    width: int
    height: int
    objects: tuple[CocoObject, ...]


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """All of an annotation file.

    `classes` are the names in the file's order, without a super-category that has no objects (as
    Roboflow writes one). `problems` are objects left out or changed. `digest` is of the file.
    """

    pictures: tuple[CocoPicture, ...]
    classes: tuple[str, ...]
    problems: tuple[Problem, ...]
    digest: str


def read_coco(
    path: str | os.PathLike[str], names: Mapping[str, str] | None = None, crowds: bool = False
) -> CocoFile:
    """Reads an annotation file; raises DatasetError for one that is none or has no pictures.

    `names` renames classes; a class with a semicolon, which separates classes in a prompt, needs
    another name. Objects that stand for a crowd (iscrowd) are left out unless `crowds`.
    """
    path = Path(path).expanduser()
    data, digest = _load(path)
    missing = [key for key in ("images", "annotations", "categories") if key not in data]
    if missing or not all(isinstance(data[key], list) for key in data if key in _LISTS):
        raise DatasetError(
            f"{path} is no COCO file: it has no list of {' and '.join(missing) or 'objects'}. A "
            'file with "images", "annotations" and "categories" fits. Export it again.'
        )
    return _Reading(path, data, dict(names or {}), crowds, digest).file()


_LISTS = ("images", "annotations", "categories")


def _load(path: Path) -> tuple[dict[str, Any], str]:
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as e:
        raise DatasetError(
            f"The data file {path} cannot be read: {e.strerror}. A COCO annotation file fits. "
            f"Look with: ls -l {path.parent}"
        ) from e
    except (ValueError, RecursionError) as e:
        raise DatasetError(
            f"{path} is no JSON: {e}. A COCO annotation file fits. Export or download it again."
        ) from e
    if not isinstance(data, dict):
        raise DatasetError(f"{path} is no COCO file: it holds no object. Export it again.")
    return data, hashlib.sha256(content).hexdigest()[:32]


@dataclasses.dataclass
class _Reading:
    path: Path
    data: dict[str, Any]
    names: dict[str, str]
    crowds: bool
    digest: str
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def file(self) -> CocoFile:
        labels = self._labels()
        sizes: dict[Any, tuple[str, int, int]] = {}
        for entry in self.data["images"]:
            place = f"{short_name(self.path)}:image {_get(entry, 'id')}"
            try:
                width, height = int(entry["width"]), int(entry["height"])
                name, key = entry["file_name"], entry["id"]
                if width < 1 or height < 1 or not isinstance(name, str) or key in sizes:
                    raise ValueError(key)
            except (KeyError, TypeError, ValueError) as e:
                raise DatasetError(
                    f"{self.path}: the picture {str(entry)[:120]} lacks an id of its own, a "
                    "file_name, width or height. All of them fit. Export the file again."
                ) from e
            sizes[key] = (place, width, height)
        objects: dict[Any, list[CocoObject]] = {key: [] for key in sizes}
        for entry in self.data["annotations"]:
            self._add(entry, sizes, labels, objects)
        pictures = tuple(
            CocoPicture(
                sizes[entry["id"]][0], entry["file_name"], *sizes[entry["id"]][1:],
                tuple(objects[entry["id"]]),
            )
            for entry in self.data["images"]
        )  # fmt: skip
        if not pictures:
            raise DatasetError(f"{self.path} has no pictures. At least one fits. Export it again.")
        return CocoFile(pictures, tuple(labels.values()), tuple(self.problems), self.digest)

    def _labels(self) -> dict[Any, str]:
        used = {_get(entry, "category_id") for entry in self.data["annotations"]}
        parents = {_get(entry, "supercategory") for entry in self.data["categories"]}
        labels: dict[Any, str] = {}
        bad: list[str] = []
        for entry in self.data["categories"]:
            key, name = _get(entry, "id"), _get(entry, "name")
            if key in labels or not isinstance(name, str):
                raise DatasetError(
                    f"{self.path}: the class {str(entry)[:120]} lacks a name or an id of its own. "
                    "Both fit. Export the file again."
                )
            # Roboflow writes the project as class 0, the super-category of all others.
            top = _get(entry, "supercategory") in (None, "none")
            if top and name in parents and key not in used:
                continue
            name = self.names.get(name, name)
            try:
                (labels[key],) = split_labels([name])
            except InvalidPromptError:
                bad.append(name)
        if bad:
            example = {name: name.replace(";", ",").replace("\n", " ") for name in bad[:3]}
            raise DatasetError(
                f"{self.path}: the classes {bad} cannot stand in a prompt. Words without semicolon "
                f"or line break fit. Rename them: names={example}"
            )
        if not labels:
            raise DatasetError(f"{self.path} has no classes. At least one fits. Export it again.")
        return labels

    def _add(
        self,
        entry: Any,
        sizes: Mapping[Any, tuple[str, int, int]],
        labels: Mapping[Any, str],
        objects: Mapping[Any, list[CocoObject]],
    ) -> None:
        place = f"{short_name(self.path)}:annotation {_get(entry, 'id')}"
        picture, label = sizes.get(_get(entry, "image_id")), labels.get(_get(entry, "category_id"))
        if picture is None or label is None:
            what = "picture" if picture is None else "class"
            self.problems.append(
                Problem(ProblemKind.BOX, place, f"its {what} is not in the file; left out")
            )
            return
        if entry.get("iscrowd") and not self.crowds:
            return
        try:
            numbers = [float(value) for value in entry["bbox"]]
            corners, told = clip(box_corners(numbers, "xywh", *picture[1:]))
        except DatasetError as e:
            self.problems.append(Problem(ProblemKind.BOX, place, f"{e} Left out."))
            return
        except (KeyError, TypeError, ValueError):
            text = f"its bbox is {str(_get(entry, 'bbox'))[:60]}, not four numbers; left out"
            self.problems.append(Problem(ProblemKind.BOX, place, text))
            return
        if told:
            self.problems.append(Problem(ProblemKind.BOX, place, told))
        found = CocoObject(place, label, corners, entry.get("segmentation"))
        objects[entry["image_id"]].append(found)


def _get(entry: Any, key: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str | int | float | None) else str(value)


_TOGETHER = 32  # masks: bounds the memory of those that are not encoded yet
_FORMAT = 1


def encode_coco_masks(
    file: CocoFile, codec: MaskCodec, cache: Path | None
) -> tuple[list[list[Box]], tuple[Problem, ...]]:
    """The objects of each picture with their codes, and those left out as their masks are none."""
    key = _key(file, codec) if cache is not None else ""
    found = _read(cache, key) if cache is not None else None
    if found is None:
        found = _encode(file, codec)
        if cache is not None:
            _write(cache, key, *found)
    return found


def _encode(file: CocoFile, codec: MaskCodec) -> tuple[list[list[Box]], tuple[Problem, ...]]:
    boxes: list[list[Box]] = [[] for _ in file.pictures]
    problems: list[Problem] = []
    waiting: list[tuple[int, str, np.ndarray]] = []  # number of the picture, label, mask

    def flush() -> None:
        things = encode_masks(
            codec, [mask for *_, mask in waiting], [name for _, name, _ in waiting]
        )
        for (number, *_), thing in zip(waiting, things, strict=True):
            boxes[number].append(thing)
        waiting.clear()

    for number, picture in enumerate(file.pictures):
        for thing in picture.objects:
            try:
                mask = _mask(thing, picture.height, picture.width)
            except InvalidMaskError as e:
                problems.append(Problem(ProblemKind.BOX, thing.place, f"{e} Left out."))
                continue
            waiting.append((number, thing.label, mask))
            if len(waiting) == _TOGETHER:
                flush()
    flush()
    return boxes, tuple(problems)


def _mask(thing: CocoObject, height: int, width: int) -> np.ndarray:
    if not thing.segmentation:
        raise InvalidMaskError(
            "the object has no mask. Polygons or run lengths fit. Use CocoDetection for boxes."
        )
    mask = mask_from_coco(thing.segmentation, height, width)
    if not mask.any():
        raise InvalidMaskError("the mask is empty. At least one pixel fits.")
    return mask


def _key(file: CocoFile, codec: MaskCodec) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {file.digest} {file.classes}".encode())
    digest.update(str(sum(len(picture.objects) for picture in file.pictures)).encode())
    for leaf in jax.tree.leaves(codec.model):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> tuple[list[list[Box]], tuple[Problem, ...]] | None:
    """What `_write` wrote for the same file and codec; None for anything else."""
    try:
        values = json.loads(path.read_bytes())
        if values["key"] != key:
            return None
        boxes = [
            [Box(label, y1, x1, y2, x2, tuple(codes)) for label, y1, x1, y2, x2, codes in row]
            for row in values["objects"]
        ]
        problems = tuple(
            Problem(ProblemKind.BOX, place, text) for place, text in values["left out"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return boxes, problems


def _write(path: Path, key: str, boxes: list[list[Box]], problems: tuple[Problem, ...]) -> None:
    objects = [
        [[box.label, box.y1, box.x1, box.y2, box.x2, box.codes] for box in row] for row in boxes
    ]
    values = {
        "key": key, "objects": objects,
        "left out": [[problem.place, problem.text] for problem in problems],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, so that nobody reads half of it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump(values, file)
    os.replace(file.name, path)


_log = logging.getLogger(__name__)


class _CocoSource:
    """One record a picture; a picture without objects has an empty answer."""

    def __init__(
        self,
        path: Path,
        images: str | os.PathLike[str] | ImageFolder | None,
        file: CocoFile,
        prefix: str,
        suffixes: list[str],
        problems: tuple[Problem, ...],
    ):
        folder = path.parent if images is None else images
        self.path = path
        self.images = folder if isinstance(folder, ImageFolder) else ImageFolder(Path(folder))
        self.classes = file.classes
        self.problems = problems
        self._digest = file.digest
        self._prefix = prefix
        # Text alone goes to the processes that read: a parsed file can be gigabytes.
        self._rows = [
            (picture.place, picture.name, (picture.width, picture.height), suffix)
            for picture, suffix in zip(file.pictures, suffixes, strict=True)
        ]
        if problems:
            _log.warning(
                "%s: %d boxes or masks are left out or clipped, the first: %s: %s",
                path, len(problems), problems[0].place, problems[0].text,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        place, name, size, suffix = self._rows[check_number(index, len(self), self.path)]
        try:
            image = self.images.path_of(name)
        except DatasetError as e:
            raise DatasetError(f"{place}: {e}") from e
        return Record((image,), self._prefix, suffix, place, size=size)

    def fingerprint(self) -> str:
        """Of the file's contents."""
        return f"{type(self).__name__} {self._digest}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class CocoDetection(_CocoSource):
    """`detect a ; b ; c` with all classes, and every box of the picture.

    Transforms shuffle the boxes and ask for fewer classes. Boxes are clipped to the picture, and
    left out where nothing remains: `problems` lists those.

    Args:
      path: the annotation file.
      images: the folder of the pictures; the file's own if not given.
      names: other names for classes.
      crowds: whether objects that stand for a crowd are used.

    Raises DatasetError for a file that is not COCO's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        *,
        names: Mapping[str, str] | None = None,
        crowds: bool = False,
    ):
        path = Path(path).expanduser()
        file = read_coco(path, names, crowds)
        suffixes = [
            format_answer(Box(thing.label, *thing.corners) for thing in picture.objects)
            for picture in file.pictures
        ]
        prefix = prompts.detect(file.classes)
        super().__init__(path, images, file, prefix, suffixes, file.problems)


class CocoSegmentation(_CocoSource):
    """`segment a ; b ; c` with all classes, and the box and the mask of every object.

    Masks are encoded once, when the source is made; `cache` is a file that keeps the codes for the
    next time. Boxes are those around the masks. Arguments and errors as in `CocoDetection`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        codec: MaskCodec,
        images: str | os.PathLike[str] | ImageFolder | None = None,
        *,
        names: Mapping[str, str] | None = None,
        crowds: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ):
        path = Path(path).expanduser()
        file = read_coco(path, names, crowds)
        kept = None if cache is None else Path(cache).expanduser()
        boxes, problems = encode_coco_masks(file, codec, kept)
        suffixes = [format_answer(found) for found in boxes]
        prefix = prompts.segment(file.classes)
        super().__init__(path, images, file, prefix, suffixes, file.problems + problems)
