"""The masks of a COCO file -> mask codes, many at a time, kept in a file for the next time."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

from paligemma_jax.data.coco_file import CocoFile, CocoObject
from paligemma_jax.data.problem import Kind, Problem
from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.mask_objects import encode_masks
from paligemma_jax.processing.mask_source import mask_from_coco
from paligemma_jax.processing.parsing import Box

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
                problems.append(Problem(Kind.BOX, thing.place, f"{e} Left out."))
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
        problems = tuple(Problem(Kind.BOX, place, text) for place, text in values["left out"])
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
