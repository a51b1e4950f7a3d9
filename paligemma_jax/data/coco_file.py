"""COCO's annotation files: pictures with objects, boxes in pixels, masks as polygons or runs."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.data.box_layouts import Corners, XYWHPixels, clip
from paligemma_jax.data.problem import Kind, Problem
from paligemma_jax.data.record import short_name
from paligemma_jax.errors import DatasetError, InvalidPromptError
from paligemma_jax.processing.prompts import split_labels

_BOXES = XYWHPixels()


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
                Problem(Kind.BOX, place, f"its {what} is not in the file; left out")
            )
            return
        if entry.get("iscrowd") and not self.crowds:
            return
        try:
            numbers = [float(value) for value in entry["bbox"]]
            corners, told = clip(_BOXES.corners(numbers, *picture[1:]))
        except DatasetError as e:
            self.problems.append(Problem(Kind.BOX, place, f"{e} Left out."))
            return
        except (KeyError, TypeError, ValueError):
            text = f"its bbox is {str(_get(entry, 'bbox'))[:60]}, not four numbers; left out"
            self.problems.append(Problem(Kind.BOX, place, text))
            return
        if told:
            self.problems.append(Problem(Kind.BOX, place, told))
        found = CocoObject(place, label, corners, entry.get("segmentation"))
        objects[entry["image_id"]].append(found)


def _get(entry: Any, key: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str | int | float | None) else str(value)
