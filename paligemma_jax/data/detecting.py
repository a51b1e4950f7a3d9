"""Rows with boxes or masks -> records that ask for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from paligemma_jax.data.box_layouts import BoxLayout, XYWHPixels, clip
from paligemma_jax.data.readers import Row, column, images_in
from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError, PaliGemmaError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.mask_objects import encode_masks
from paligemma_jax.processing.mask_source import mask_from_coco
from paligemma_jax.processing.parsing import Box, format_answer


@dataclasses.dataclass(frozen=True)
class Detect:
    """`detect ...` for rows with a list of boxes and a list of labels.

    Attributes:
      classes: what every prompt asks for; labels that are numbers count in it. Without, a prompt
        asks for what is in its picture, and rows without objects are an error.
      boxes, labels: columns, such as those of Hugging Face's COCO-like data sets.
      layout: the order and the units of the numbers of a box.
    """

    classes: tuple[str, ...] = ()
    image: str = "image"
    boxes: str = "objects.bbox"
    labels: str = "objects.category"
    layout: BoxLayout = XYWHPixels()

    @property
    def image_fields(self) -> tuple[str, ...]:
        return (self.image,)

    def __call__(self, row: Row, place: str) -> Record:
        images, width, height = _picture(row, self.image)
        boxes, names = list(column(row, self.boxes)), _labels(row, self.labels, self.classes)
        if len(boxes) != len(names):
            raise DatasetError(
                f"{self.boxes!r} has {len(boxes)} entries and {self.labels!r} {len(names)}. "
                "Equally many fit. Correct the record."
            )
        things = []
        for name, numbers in zip(names, boxes, strict=True):
            try:
                values = [float(value) for value in numbers]
                corners, _ = clip(self.layout.corners(values, width, height))
            except (TypeError, ValueError) as e:
                told = str(e) if isinstance(e, DatasetError) else f"the box {numbers} is none."
                raise DatasetError(f"{self.boxes!r}: {told}") from e
            things.append(Box(name, *corners))
        return _record(images, prompts.detect, self.classes, names, things, place, (width, height))


@dataclasses.dataclass(frozen=True)
class Segment:
    """`segment ...` for rows with a list of masks and a list of labels.

    A mask is a polygon list or run lengths as COCO writes them, or an array of the picture's size.
    The codec runs where rows are read; on the processor in worker processes.
    """

    codec: MaskCodec
    classes: tuple[str, ...] = ()
    image: str = "image"
    masks: str = "objects.segmentation"
    labels: str = "objects.category"

    @property
    def image_fields(self) -> tuple[str, ...]:
        return (self.image,)

    def __call__(self, row: Row, place: str) -> Record:
        images, width, height = _picture(row, self.image)
        names = _labels(row, self.labels, self.classes)
        try:
            masks = [_mask(mask, height, width) for mask in column(row, self.masks)]
            things = encode_masks(self.codec, masks, names)
        except PaliGemmaError as e:
            raise DatasetError(f"{self.masks!r}: {e}") from e
        return _record(images, prompts.segment, self.classes, names, things, place, (width, height))


def _picture(row: Row, name: str) -> tuple[tuple[Any, ...], int, int]:
    try:
        pictures = tuple(load_image(image) for image in images_in(row, name))
    except DatasetError:
        raise
    except PaliGemmaError as e:
        raise DatasetError(str(e)) from e
    if len(pictures) != 1:
        raise DatasetError(f"{name!r} holds {len(pictures)} pictures. One fits where boxes are.")
    return pictures, pictures[0].width, pictures[0].height


def _labels(row: Row, name: str, classes: Sequence[str]) -> list[str]:
    names = []
    for label in column(row, name):
        if isinstance(label, int | np.integer):
            if not 0 <= label < len(classes):
                raise DatasetError(
                    f"{name!r} holds the number {label}, and there are {len(classes)} classes. "
                    "Their names, in order, fit. Give them: Detect(classes=('cat', 'dog'))"
                )
            label = classes[int(label)]
        label = bytes(label).decode("utf-8", "replace") if isinstance(label, bytes) else label
        if classes and label not in classes:
            raise DatasetError(
                f"{name!r} holds {label!r}, which is none of the classes {', '.join(classes)}. "
                "One of them fits. Add it to classes, or correct it."
            )
        names.append(label)
    return names


def _mask(mask: Any, height: int, width: int) -> np.ndarray:
    if isinstance(mask, np.ndarray) and mask.shape[:2] == (height, width):
        return mask.reshape(height, width) > 0
    return mask_from_coco(mask, height, width)


def _record(
    images: tuple[Any, ...], ask: Any, classes: Sequence[str], names: Sequence[str],
    things: Sequence[Box], place: str, size: tuple[int, int],
) -> Record:  # fmt: skip
    asked = list(classes) or list(dict.fromkeys(names))
    if not asked:
        raise DatasetError(
            "there are no objects, so nothing to ask for. Give the classes, and the answer is "
            "empty: classes=('cat', 'dog')"
        )
    try:
        return Record(images, ask(asked), format_answer(things), place, size=size)
    except PaliGemmaError as e:
        raise DatasetError(str(e)) from e
