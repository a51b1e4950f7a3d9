"""COCO annotation files -> records that ask for all classes of the file in every image.

Boxes in pixels become location tokens, and masks (polygons or run lengths) mask tokens.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.data.object_readers import Corners, box_corners, clip
from paligemma_jax.data.record import (
    ImageFolder,
    Problem,
    ProblemKind,
    Record,
    check_index,
    short_name,
)
from paligemma_jax.errors import DatasetError, InvalidMaskError, InvalidPromptError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.location_tokens import Box, format_answer
from paligemma_jax.processing.masks import MaskCodec, encode_masks, mask_from_coco

_MASK_BATCH = 32  # bounds the memory of masks that are not encoded yet
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CocoObject:
    """An object: its class, its box clipped to the image, and its mask as it is written."""

    where: str
    label: str
    corners: Corners
    segmentation: Any


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image of width x height pixels and its objects, in the file's order."""

    where: str
    name: str
    width: int
    height: int
    objects: tuple[CocoObject, ...]


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """All of an annotation file.

    `classes` are the names in the file's order, without a super-category that has no objects (as
    Roboflow writes one). `problems` are objects that were skipped or clipped.
    """

    images: tuple[CocoImage, ...]
    classes: tuple[str, ...]
    problems: tuple[Problem, ...]
    checksum: str


def read_coco(path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> CocoFile:
    """Reads an annotation file; raises DatasetError for one that is malformed or has no images.

    `names` renames classes; one with a semicolon, which separates classes in a prompt, needs
    another name. Objects that stand for a crowd (iscrowd) are skipped.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as e:
        raise DatasetError(
            f"The data file {path} cannot be read: {e.strerror}. Look with: ls -l "
            f"{shlex.quote(str(path.parent))}"
        ) from e
    except (ValueError, RecursionError) as e:
        raise DatasetError(f"{path} is not JSON: {e}. Export or download it again.") from e
    keys = ("images", "annotations", "categories")
    missing = [k for k in keys if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if missing:
        raise DatasetError(
            f"{path} must be a COCO annotation file, an object with the lists {', '.join(keys)}; "
            f"it lacks {' and '.join(missing)}. Export it again."
        )
    labels = _labels(path, data, names or {})
    images: dict[Any, CocoImage] = {}
    for entry in data["images"]:
        where = f"{short_name(path)}:image {_get(entry, 'id')}"
        try:
            width, height = int(entry["width"]), int(entry["height"])
            name, key = entry["file_name"], entry["id"]
            if width < 1 or height < 1 or not isinstance(name, str) or key in images:
                raise ValueError(key)
        except (KeyError, TypeError, ValueError) as e:
            raise DatasetError(
                f"{path}: expected an image with an id of its own, file_name, width and height, "
                f"got {str(entry)[:120]}"
            ) from e
        images[key] = CocoImage(where, name, width, height, ())
    if not images:
        raise DatasetError(f"{path} has no images. Export it again.")
    objects: dict[Any, list[CocoObject]] = {key: [] for key in images}
    problems: list[Problem] = []
    for entry in data["annotations"]:
        where = f"{short_name(path)}:annotation {_get(entry, 'id')}"
        image, label = images.get(_get(entry, "image_id")), labels.get(_get(entry, "category_id"))
        try:
            if image is None or label is None:
                what = "image" if image is None else "class"
                raise DatasetError(f"its {what} is not in the file.")
            if entry.get("iscrowd"):
                continue
            box = box_corners(entry.get("bbox"), "xywh", image.width, image.height)
            corners, clipped = clip(box)
        except DatasetError as e:
            problems.append(Problem(ProblemKind.BOX, where, f"{e} Skipped."))
            continue
        if clipped:
            problems.append(Problem(ProblemKind.BOX, where, clipped))
        objects[entry["image_id"]].append(
            CocoObject(where, label, corners, entry.get("segmentation"))
        )
    filled = (dataclasses.replace(image, objects=tuple(objects[k])) for k, image in images.items())
    checksum = hashlib.sha256(content).hexdigest()[:32]
    return CocoFile(tuple(filled), tuple(labels.values()), tuple(problems), checksum)


def _labels(path: Path, data: dict[str, Any], names: Mapping[str, str]) -> dict[Any, str]:
    """The class of each id."""
    used = {_get(entry, "category_id") for entry in data["annotations"]}
    parents = {_get(entry, "supercategory") for entry in data["categories"]}
    labels: dict[Any, str] = {}
    bad: list[str] = []
    for entry in data["categories"]:
        key, name = _get(entry, "id"), _get(entry, "name")
        if key in labels or not isinstance(name, str):
            raise DatasetError(
                f"{path}: expected a class with a name and an id of its own, got {str(entry)[:120]}"
            )
        # Roboflow writes the project as class 0, the super-category of all others.
        top = _get(entry, "supercategory") in (None, "none")
        if top and name in parents and key not in used:
            continue
        name = names.get(name, name)
        try:
            (labels[key],) = prompts.split_labels([name])
        except InvalidPromptError:
            bad.append(name)
    if bad:
        example = {name: name.replace(";", ",").replace("\n", " ") for name in bad[:3]}
        raise DatasetError(
            f"{path}: names of classes must have no semicolon or line break, got {bad}. Rename "
            f"them: names={example}"
        )
    if not labels:
        raise DatasetError(f"{path} has no classes. Export it again.")
    return labels


def _get(entry: Any, key: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str | int | float | None) else str(value)


class CocoSource:
    """`detect a ; b ; c` with all classes of the file, and every box of the image.

    With a mask codec `segment a ; b ; c`, and the box and mask of every object; boxes are then
    those around the masks, which are encoded once, when the source is made. Boxes are clipped to
    the image, and objects without any part in it are skipped: `problems` lists those. An image
    without objects has an empty answer. Transforms shuffle the boxes and ask for fewer classes.

    Args:
      path: the annotation file.
      images: the folder of the images; the file's own if not given.
      codec: encodes masks.
      names: other names for classes.

    Raises DatasetError for a file that is not COCO's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        *,
        codec: MaskCodec | None = None,
        names: Mapping[str, str] | None = None,
    ):
        self.path = Path(path).expanduser()
        self.images = ImageFolder.of(images, self.path.parent)
        file = read_coco(self.path, names)
        self.classes, self.problems = file.classes, file.problems
        if codec is None:
            self._task = "detect"
            boxes = [[Box(o.label, *o.corners) for o in image.objects] for image in file.images]
        else:
            self._task = "segment"
            boxes, problems = _encode(file, codec)
            self.problems += problems
        self._checksum = file.checksum
        # Text alone goes to worker processes: a parsed file can be gigabytes.
        self._entries = [
            (image.where, image.name, (image.width, image.height), format_answer(found))
            for image, found in zip(file.images, boxes, strict=True)
        ]
        if self.problems:
            first = f"{self.problems[0].where}: {self.problems[0].text}"
            _log.warning(
                "%s: skipped or clipped %d boxes or masks, the first: %s",
                self.path, len(self.problems), first,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        where, name, size, suffix = self._entries[check_index(index, len(self), self.path)]
        try:
            image = self.images.path_of(name)
        except DatasetError as e:
            raise DatasetError(f"{where}: {e}") from e
        ask = prompts.detect if self._task == "detect" else prompts.segment
        return Record((image,), ask(self.classes), suffix, where, size=size)

    def fingerprint(self) -> str:
        """Of the file's contents and the task."""
        return f"{self._task} {self._checksum}"

    def __repr__(self) -> str:
        return f"CocoSource({str(self.path)!r}, {self._task})"


def _encode(file: CocoFile, codec: MaskCodec) -> tuple[list[list[Box]], tuple[Problem, ...]]:
    """The objects of each image with their codes, and those that were skipped for their masks."""
    boxes: list[list[Box]] = [[] for _ in file.images]
    problems: list[Problem] = []
    waiting: list[tuple[int, str, Any]] = []  # number of the image, label, mask

    def encode_waiting() -> None:
        numbers, labels, masks = zip(*waiting, strict=True)
        for number, box in zip(numbers, encode_masks(codec, masks, labels), strict=True):
            boxes[number].append(box)
        waiting.clear()

    for number, image in enumerate(file.images):
        for thing in image.objects:
            try:
                if not thing.segmentation:
                    raise InvalidMaskError("the object has no mask.")
                mask = mask_from_coco(thing.segmentation, image.height, image.width)
                if not mask.any():
                    raise InvalidMaskError("the mask is empty.")
            except InvalidMaskError as e:
                problems.append(Problem(ProblemKind.BOX, thing.where, f"{e} Skipped."))
                continue
            waiting.append((number, thing.label, mask))
            if len(waiting) == _MASK_BATCH:
                encode_waiting()
    if waiting:
        encode_waiting()
    return boxes, tuple(problems)
