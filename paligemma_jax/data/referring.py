"""Rows of objects with masks and expressions -> records of one of them, as RefCOCO is learnt.

From big_vision's pp/proj/paligemma/segmentation.py and its builder of RefCOCO: the expression alone
is the prompt; the answer is the annotated box and the codes of the mask inside it, without a label.
"""

import dataclasses
import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.data.answer_choice import place_in_turn
from paligemma_jax.data.readers import Pictured, Row, column, images_in, texts_of
from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError, InvalidMaskError
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.mask_source import load_mask
from paligemma_jax.processing.masks import crop_for_codec

_BINS = 1023


@dataclasses.dataclass(frozen=True)
class Referred:
    """An object: what it is called, and the answer that names its place."""

    expressions: tuple[str, ...]
    suffix: str


@dataclasses.dataclass(frozen=True)
class ReferringRecord(Record):
    """A picture with all its objects; prompt and answer are the first one's until one is chosen."""

    objects: tuple[Referred, ...] = ()


@dataclasses.dataclass(frozen=True)
class Referring(Pictured):
    """Rows of one picture, its objects and the expressions of each: a `ReferringRecord`.

    `OneReferred` chooses among them. Masks are encoded when they are first met, and the codes kept.

    Attributes:
      masks: column of PNG files or arrays [H, W] or [H, W, 3], one an object, of the whole picture.
      boxes: column of y1, x1, y2, x2 as fractions of the picture.
      expressions: column with a list of texts an object.
      codec: of the checkpoint; a run puts it in where `Data(..., masks=True)`.
    """

    masks: str = "objects.mask"
    boxes: str = "objects.bbox"
    expressions: str = "objects.refs.sentence"
    codec: MaskCodec | None = dataclasses.field(default=None, compare=False, repr=False)
    _known: dict[bytes, str] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __call__(self, row: Row, place: str) -> Record:
        masks, boxes = list(column(row, self.masks)), list(column(row, self.boxes))
        texts = list(column(row, self.expressions))
        if not len(masks) == len(boxes) == len(texts):
            raise DatasetError(
                f"there are {len(masks)} masks, {len(boxes)} boxes and {len(texts)} lists of "
                "expressions. One of each an object fits. Correct the record."
            )
        if not masks:
            raise DatasetError("there are no objects. At least one fits. Leave the record out.")
        objects = tuple(
            Referred(texts_of(text, self.expressions), suffix)
            for text, suffix in zip(texts, self._suffixes(masks, boxes), strict=True)
        )
        first = objects[0]
        images = images_in(row, self.image)
        return ReferringRecord(images, first.expressions[0], first.suffix, place, objects=objects)

    def _suffixes(self, masks: list[Any], boxes: list[Any]) -> list[str]:
        keys = [_key(mask, box) for mask, box in zip(masks, boxes, strict=True)]
        new = [place for place, key in enumerate(keys) if key not in self._known]
        if new:
            if self.codec is None:
                raise DatasetError(
                    "masks become tokens by a mask codec, and there is none. A checkpoint that has "
                    "one fits, with: Data(..., reader=Referring(), masks=True)"
                )
            try:
                crops = np.stack([_crop(masks[place], _box(boxes[place])) for place in new])
            except InvalidMaskError as e:
                raise DatasetError(f"{self.masks!r}: {e}") from e
            for place, codes in zip(new, self.codec.encode(crops).tolist(), strict=True):
                self._known[keys[place]] = _suffix(_box(boxes[place]), codes)
        return [self._known[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class OneReferred:
    """One object of a `ReferringRecord`, another every epoch until all have come, and any name."""

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if not isinstance(record, ReferringRecord) or not record.objects:
            return record
        chosen = record.objects[place_in_turn(record, len(record.objects), self.seed)]
        name = chosen.expressions[int(rng.integers(len(chosen.expressions)))]
        return dataclasses.replace(record, prefix=name, suffix=chosen.suffix, objects=())


def _box(values: Any) -> np.ndarray:
    try:
        box = np.asarray(values, np.float32)
    except (TypeError, ValueError) as e:
        raise DatasetError(f"the box {values} is none. Four fractions y1, x1, y2, x2 fit.") from e
    if box.shape != (4,) or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise DatasetError(
            f"the box {values} is none. y1, x1, y2, x2 from 0 to 1 fit. Divide pixels by the "
            "height and width of the picture."
        )
    return box


def _crop(source: Any, box: np.ndarray) -> np.ndarray:
    if isinstance(source, bytes | np.bytes_):
        try:
            with Image.open(io.BytesIO(source)) as image:
                source = np.asarray(image)
        except (OSError, UnidentifiedImageError) as e:
            raise InvalidMaskError(
                f"A mask cannot be read: {e}. A grey PNG of the picture's size fits."
            ) from e
    mask = load_mask(source)
    height, width = mask.shape
    size = np.array([height, width, height, width], np.float32)
    # In float32, as there: a box that ends between two pixels is rounded to the same one.
    return crop_for_codec(mask, (np.rint(size * box) / size.astype(np.float64)).tolist())


def _suffix(box: np.ndarray, codes: list[int]) -> str:
    locations = np.clip(np.rint(box * np.float32(_BINS)), 0, _BINS).astype(int).tolist()
    where = "".join(f"<loc{value:04d}>" for value in locations)
    return where + "".join(f"<seg{code:03d}>" for code in codes)


def _key(mask: Any, box: Any) -> bytes:
    pixels = np.asarray(mask)
    content = mask if isinstance(mask, bytes) else pixels.tobytes()
    head = f"{pixels.shape} {_box(box).tolist()}".encode()
    return hashlib.sha256(head + content).digest()
