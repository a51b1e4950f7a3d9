"""A path -> the source of records it holds, whatever the layout."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from paligemma_jax.data.coco import CocoDetection, CocoSegmentation
from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.data.jsonl import JsonlSource
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import RecordSource
from paligemma_jax.data.referring import Referring
from paligemma_jax.data.tfds import TfdsSource
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.mask_codec import MaskCodec

_SAME = ("valid", "val", "validation", "dev")  # names of one split
_KNOWN = (
    "A .jsonl file; a COCO .json file; a directory with dataset/_annotations.train.jsonl (Roboflow "
    '"paligemma"), train/annotations.jsonl (Roboflow "jsonl"), train/_annotations.coco.json, or '
    "annotations/instances_train2017.json beside train2017/ (COCO); and a version of a data set "
    "that tfds prepared as array_record fit."
)


def open_source(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    images: str | os.PathLike[str] | ImageFolder | None = None,
    reader: Reader | None = None,
    codec: MaskCodec | None = None,
) -> RecordSource:
    """The records at `path`, a file or a directory in one of the layouts of `find_splits`.

    Args:
      path: where the data is.
      split: which part; ignored for a single file. "valid", "val" and "validation" are the same.
      images: the folder of the pictures, if it is not the one of the layout.
      reader: which fields a record is made of, of JSON lines and TensorFlow Datasets.
      codec: makes COCO's masks the answer, and not its boxes alone; and encodes for `Referring`.

    Raises DatasetError for an unknown layout or split.
    """
    found = find_splits(path)
    name = next((name for name in found if name in ("", split) or _same(name, split)), None)
    place = next(iter(found.values())) if name is None else found[name]
    if codec is not None and isinstance(reader, Referring):
        reader = dataclasses.replace(reader, codec=codec)
    if place.is_dir():  # tfds reads "train[:90%]" and "train+validation" too
        return TfdsSource(place, name or split, reader)
    if name is None:
        near = next(iter(found))
        raise DatasetError(
            f"{path} has no split {split!r}. {', '.join(found)} fits. Open for example: "
            f"open_source({os.fspath(path)!r}, {near!r})"
        )
    if place.suffix == ".jsonl":
        return JsonlSource(place, images, reader)
    if images is None:
        images = coco_pictures(place)
    if codec is not None:
        return CocoSegmentation(place, codec, images)
    return CocoDetection(place, images)


def find_splits(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The splits at `path` by name, and the file (for TensorFlow Datasets, directory) of each.

    A file is a split without a name. Raises DatasetError if there is none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DatasetError(f"There is no data at {path}. {_KNOWN} Look with: ls {path.parent}")
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise DatasetError(f"{path} is neither .jsonl nor .json. {_KNOWN} Name such a file.")
        return {"": path}
    if (path / "dataset_info.json").is_file():
        return _tfds_splits(path)
    found: dict[str, Path] = {}
    for name, file in _candidates(path):
        found.setdefault(name, file)
    if not found:
        lines = sorted(path.glob("*.jsonl"))
        found = {"": lines[0]} if len(lines) == 1 else {file.stem: file for file in lines}
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DatasetError(f"{path} holds no data of a known layout: {inside}. {_KNOWN}")
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _candidates(path: Path) -> Iterator[tuple[str, Path]]:
    for folder in (path, path / "dataset"):
        for file in sorted(folder.glob("_annotations.*.jsonl")):
            yield file.name.split(".")[1], file
    for name in ("annotations.jsonl", "_annotations.coco.json"):
        for file in sorted(path.glob(f"*/{name}")):
            yield file.parent.name, file
        if (path / name).is_file():
            yield "", path / name
    for file in sorted((path / "annotations").glob("instances_*.json")):
        if match := re.fullmatch(r"instances_([a-z]+)\d*", file.stem):
            yield match[1], file


def coco_pictures(file: Path) -> Path | None:
    """COCO keeps pictures beside the folder of annotations, in one of the split's name."""
    match = re.fullmatch(r"instances_([a-z]+\d*)", file.stem)
    if match and file.parent.name == "annotations":
        for folder in (file.parents[1] / match[1], file.parents[1] / "images" / match[1]):
            if folder.is_dir():
                return folder
    return None


def _tfds_splits(path: Path) -> dict[str, Path]:
    names = {file.name.split(".array_record")[0].partition("-")[2] for file in path.iterdir()
             if ".array_record" in file.name}  # fmt: skip
    if not names:
        raise DatasetError(
            f"{path} is a data set of tfds without array_record files; others need TensorFlow. "
            "array_record fits. Prepare it again with: tfds build --file_format array_record"
        )
    return {name: path for name in sorted(names, key=_place)}


def _same(name: str, other: str) -> bool:
    return name in _SAME and other in _SAME


def _place(name: str) -> tuple[int, str]:
    """For sorting: splits in the order of their use."""
    order = ("train", *_SAME, "test")
    return order.index(name) if name in order else len(order), name
